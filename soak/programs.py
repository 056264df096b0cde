"""The programs on trial: started in forks of this process, waited for, killed; small commands for them."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from utils.experiments.processes import start_fresh, start_warm

FOLDER = Path(__file__).resolve().parents[1]
PATIENCE = 900  # seconds after which a program that does not end has failed
DIGITS = "--digits --data-subset 0:20 --learning-rate-adjust-frequency 2 --lr 0.05 --batch-size 64 --device cpu".split()
SMALL = [
    *DIGITS,
    *"--n-blocks 2 --factorize-filters 0 --scat-angles 4 --psi-arch mod --Pr-size 4 8 "
    "--classifier-batch-norm std --no-classifier-bias -a".split(),
    "Fw Std Pr N",
]
RESNET = [*DIGITS, *"--arch resnet18-custom --standard-width-scaling 0.1 --resize-images 32 --lr 0.001".split()]


def training(root, name="run", *more):
    """The command of a small training in ROOT/NAME."""
    return ["main_block.py", *SMALL, "--epochs", "12", "--checkpoints", str(root), "--dir", name, *map(str, more)]


def sampling(root, name="run", *more):
    """The command that samples three networks from the training `name`."""
    return [
        "resample.py",
        "--experiment",
        name,
        "--checkpoints",
        str(root),
        "--device",
        "cpu",
        "--num-repeats",
        "3",
        *map(str, more),
    ]


def experiments(root, *more):
    """The command that runs the four experiments of the narrowest network of figure 3, two epochs each."""
    return [
        "run_exps.py",
        "--scale",
        "laptop",
        "--match",
        "^(?=.*WP2WP4WP8WP8-norm)(?!.*-init)",
        "--device",
        "cpu",
        "--epochs",
        "2",
        "--data-subset",
        "0:20",
        "--checkpoints",
        str(root),
        "--jobs",
        "2",
        *map(str, more),
    ]


class Program:
    """A script of the repository at work, with what it prints. `status`: its exit status, None while it runs."""

    def __init__(self, command, fresh=False, **environment):
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        self.command = list(command)
        if command[0].endswith(".py"):
            command = [str(FOLDER / command[0]), *command[1:]]
        start = start_fresh if fresh else start_warm
        with open(writer, "wb") as output:
            self._process = start([sys.executable, *command], output, {**os.environ, **environment})
        self.pid, self._text, self.status = self._process.pid, b"", None

    def poll(self):
        """The exit status (-N: killed by signal N), None while it runs."""
        self._read()
        if self.status is None:
            self.status = self._process.poll()
        return self.status

    def wait(self, seconds=PATIENCE):
        """Waits for the end, for some time. Returns the exit status or None."""
        return self.status if wait_for(lambda: self.poll() is not None, seconds, 0.002) else None

    def send(self, signum):
        self._process.send(signum)

    def kill(self, with_children=False):
        """SIGKILL, and no more is heard of it."""
        for pid in [*(children(self.pid) if with_children else ()), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    @property
    def output(self):
        """What it has printed so far."""
        self._read()
        return self._text.decode(errors="replace")

    @property
    def last_line(self):
        return (self.output.splitlines() or [""])[-1]

    def _read(self):
        with contextlib.suppress(BlockingIOError):
            while self._reader is not None and (part := os.read(self._reader, 1 << 16)):
                self._text += part

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.poll() is None:
            self.kill(with_children=True)
        self._read()
        os.close(self._reader)
        self._reader = None


def run(command, fresh=False, **environment):
    """Runs a command to its end. Returns the ended Program."""
    with Program(command, fresh, **environment) as program:
        if program.wait() is None:
            raise TimeoutError(f"{' '.join(command)} did not end")
        return program


def wait_for(condition, seconds=PATIENCE, pause=0.01):
    """Waits until the condition holds. Returns whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return holds


def children(pid):
    """Process numbers of a process's children and theirs (Linux)."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [child for parent in own for child in children(parent)]
