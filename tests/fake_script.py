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
from utils.files import write_json
from utils.lock import Lock
from utils.runs import options


def stop(signum, frame):
    raise StoppedError("stopped by a signal", signum)


def main(argv):
    signal.signal(signal.SIGTERM, stop)
    is_sampling = "--experiment" in sys.argv
    args = vars(options.parse_sampling() if is_sampling else options.parse())
    root = Path(args["checkpoints"])
    need = f"{args['experiment']}/last.pt" if is_sampling else args["resume"]
    if need and not (root / need).exists():
        raise UserError(f"{need} does not exist")
    folder = root / args["dir"]
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "lock"):
        last = folder / ("checkpoint_repeat0.pt" if is_sampling else "last.pt")
        train(folder, args, args["num_repeats" if is_sampling else "epochs"], last)


def train(folder, args, epochs, last):
    shares = {"threads": os.environ.get("OMP_NUM_THREADS"), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    write_json(folder / "args.json", {"args": args, **shares})
    status = {"state": "running", "epochs": epochs}
    name, (epoch, state) = args["dir"], json.loads(last.read_text()) if last.exists() else (0, "")
    while epoch < epochs:
        write_json(folder / "status.json", {**status, "epoch": epoch, "acc1": 10.0 + epoch})
        print(f"epoch {epoch} of {name}", flush=True)
        with open(folder / "epochs_begun.txt", "a") as file:
            file.write(f"{epoch}\n")
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
        if re.search(os.environ.get("FAKE_FAIL", "^$"), name):
            raise RuntimeError("made to fail")
        if re.search(os.environ.get("FAKE_KILL", "^$"), name):
            os.kill(os.getpid(), signal.SIGKILL)
        epoch, state = epoch + 1, hashlib.sha256(f"{state}{name}{epoch}".encode()).hexdigest()
        last.with_name(".last.tmp").write_text(json.dumps([epoch, state]) + " " * 500 * epoch)
        os.replace(last.with_name(".last.tmp"), last)
    write_json(folder / "status.json", {**status, "state": "finished", "epoch": epoch, "acc1": 10.0 + epoch})


if __name__ == "__main__":
    run_main(main)
