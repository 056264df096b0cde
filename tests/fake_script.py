"""Stands in for main_block.py and resample.py in the tests of the runner: the same folders, no torch, no training.

An "epoch" hashes the state before it, so that an interrupted run ends as an uninterrupted one only if it resumed
right. FAKE_SECONDS: length of an epoch. FAKE_FAIL, FAKE_KILL: regular expressions of the runs that fail, or die.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from utils.errors import StoppedError, UserError, run_main
from utils.experiments.status import flags_of
from utils.lock import Lock


def write(path, text):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def stop(signum, frame):
    raise StoppedError("stopped by a signal", signum)


def main(argv):
    signal.signal(signal.SIGTERM, stop)
    argv = sys.argv[1:]
    flags = flags_of(argv)
    root = Path(flags.get("--checkpoints", ("checkpoints",))[0])
    name = flags["--dir"][0]
    epochs = int(flags.get("--epochs", ("1",))[0])
    for need in flags.get("--experiment", ()):
        if not (root / need / "last.pt").exists():
            raise UserError(f"{need} is not trained")
    for need in flags.get("--resume", ()):
        if not (root / need).exists():
            raise UserError(f"{need} does not exist")
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "lock"):
        train(folder, name, argv, epochs, "checkpoint_repeat0.pt" if "--experiment" in flags else "last.pt")


def train(folder, name, argv, epochs, output):
    shares = {"threads": os.environ.get("OMP_NUM_THREADS"), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    write(folder / "args.json", json.dumps({"argv": argv, **shares}))
    last = folder / output
    epoch, state = json.loads(last.read_text()) if last.exists() else (0, "")
    status = {"state": "running", "epoch": epoch, "epochs": epochs, "acc1": 10.0 + epoch}
    write(folder / "status.json", json.dumps(status))
    while epoch < epochs:
        print(f"epoch {epoch} of {name}", flush=True)
        with open(folder / "epochs_begun.txt", "a") as file:
            file.write(f"{epoch}\n")
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
        if re.search(os.environ.get("FAKE_FAIL", "^$"), name):
            raise RuntimeError("made to fail")
        if re.search(os.environ.get("FAKE_KILL", "^$"), name):
            os.kill(os.getpid(), signal.SIGKILL)
        epoch, state = epoch + 1, hashlib.sha256(f"{state}{name}{epoch}".encode()).hexdigest()
        write(last, json.dumps([epoch, state]) + " " * 500 * epoch)
        write(folder / "status.json", json.dumps({**status, "epoch": epoch, "acc1": 10.0 + epoch}))
    write(folder / "status.json", json.dumps({**status, "state": "finished", "epoch": epoch, "acc1": 10.0 + epoch}))


if __name__ == "__main__":
    run_main(main)
