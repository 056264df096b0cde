"""The programs on trial, started in forks of a server that has imported them, and what they leave."""

import contextlib
import csv
import errno
import itertools
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import torch

from tests import training_runs
from tests.conftest import ROOT

PATIENCE = 900  # seconds after which a program that does not end has failed
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["main_block", "resample", "run_exps", "sklearn.datasets"])
FIGURE_3 = "--scale laptop --match ^(?=.*WP2WP4WP8WP8-norm)(?!.*-init) --epochs 2 --data-subset 0:20 --jobs 2".split()


def training(root, *more, name="run", network="norm"):
    """The command of a small training in ROOT/NAME."""
    return ["main_block.py", *training_runs.command(network, name, "--epochs", "12", "--checkpoints", root, *more)]


def sampling(root, *more, name="run"):
    """The command that samples three networks from the training `name`."""
    return ["resample.py", "--experiment", name, "--checkpoints", root, "--device", "cpu", "--num-repeats", "3", *more]


def experiments(root):
    """The command that runs the four experiments of the narrowest network of figure 3."""
    return ["run_exps.py", *FIGURE_3, "--device", "cpu", "--checkpoints", root]


COMMANDS = {"main_block.py": training, "resample.py": sampling, "run_exps.py": experiments}


class Program:
    """A command at work, killed at the end of the context; `setup` is called in its process first."""

    def __init__(self, command, setup=None):
        self.command, self._printed = list(map(str, command)), b""
        reader, writer = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=_become, args=(self.command, writer, setup))
        self.process.start()
        writer.close()
        self._thread = Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()

    def _read(self, reader):
        while part := os.read(reader.fileno(), 1 << 16):
            self._printed += part

    def wait(self, seconds=PATIENCE):
        """Waits for the end, for some time; then `status` is the exit status (-N: killed by signal N) or None, and
        `output` and `last_line` are what was printed so far. Returns the status."""
        self.process.join(seconds)
        self.status = self.process.exitcode
        if self.status is not None:
            self._thread.join(1)  # it goes on for as long as a child that is left may print
        self.output = self._printed.decode(errors="replace")
        self.last_line = (self.output.splitlines() or [""])[-1]
        return self.status

    def kill(self, with_children=True):
        for pid in [*(children(self.process.pid) if with_children else ()), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.wait(0) is None:
            self.kill()


def _become(command, writer, setup):
    """Runs the script or module `command` as the main program of this process."""
    os.setsid()
    os.chdir(ROOT)
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(writer.fileno(), number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    sys.argv, sys.path[0] = command, str(ROOT)
    if setup:
        setup()
    start = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    start(command[0], run_name="__main__")


def children(pid):
    """Process numbers of a process's children and theirs (Linux)."""
    with contextlib.suppress(OSError):
        tasks = "".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
        return [each for child in map(int, tasks.split()) for each in (child, *children(child))]
    return []


def run(command, *statuses, setup=None):
    """Runs a command to its end, which should be with one of `statuses` (default 0). Returns the ended Program."""
    with Program(command, setup) as program:
        assert program.wait() in (statuses or (0,)), f"{program.command} ended with {program.status}:\n{program.output}"
        return program


def wait_for(condition, pause=0.01):
    """Waits until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def fill_disk(first, folder):
    """Makes the disk full for this process, and for each that it starts, from its `first` write under `folder` on.

    Files opened for writing, renames and links are counted. Then files may not grow (EFBIG, where the disk would give
    ENOSPC) or the rename is refused; "full_disk: PATH" on stderr says which.
    """
    site = folder.with_name("site") / "sitecustomize.py"  # Python imports it first of all
    site.parent.mkdir(exist_ok=True)
    site.write_text(f"from tests.soak import programs\nprograms.fail_write({first}, {str(folder)!r})\n")
    os.environ["PYTHONPATH"] = f"{site.parent}:{ROOT}"
    fail_write(first, folder)


def fail_write(first, folder):
    counter = itertools.count(1)

    def hook(event, arguments):  # called before everything that touches a file
        is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        path = arguments[0] if is_open else arguments[1] if event in ("os.rename", "os.link") else None
        is_inside = isinstance(path, (str, os.PathLike)) and Path(path).resolve().is_relative_to(folder)
        if is_inside and next(counter) == first:
            os.write(2, f"full_disk: {path}\n".encode())
            if not is_open:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    sys.addaudithook(hook)


def copy(folder, place):
    """A copy of a folder at `place`, where nothing else is then."""
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(folder, place)


def content(path):
    """What a file of a run holds."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".csv":
        return list(csv.DictReader(path.read_text().splitlines(), strict=True))
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def files(root):
    """The files of runs under `root`."""
    found = (path for path in sorted(Path(root).rglob("*")) if path.is_file())
    return [path for path in found if not path.name.startswith(".") and path.name != "lock"]


def assert_readable(root):
    """Every file under `root` can be read, if it was not half-written beside its place."""
    for path in files(root):
        with contextlib.suppress(FileNotFoundError):  # renamed by a process that still ends
            content(path)


def assert_same(root, whole, ignored=()):
    """What is under `root` is what is under `whole` but for times, places and `ignored` files; nothing is left over."""
    names, others = ({p.relative_to(top): p for p in files(top) if p.name not in ignored} for top in (root, whole))
    assert names.keys() == others.keys()
    for name in names:
        if name.suffix in (".pt", ".csv"):
            assert training_runs.is_same(content(names[name]), content(others[name])), name
    left = {path.name for path in Path(root).rglob("*") if path.name.startswith(".") or path.name == "lock"}
    assert left <= set(ignored)
