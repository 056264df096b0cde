"""Starting scripts as processes of their own: from a fresh interpreter, or from one that has its imports done.

Importing torch, torchvision and scikit-learn takes longer than training a small network on a laptop. `start_warm`
forks this process, which has imported them once, and runs the script as `python SCRIPT …` would; `start_fresh` starts
an interpreter anew, as a script that runs for hours may. Either way the script has its own session, so that Ctrl-C
reaches it through the runner alone, and on Linux it is told to stop (SIGTERM) when the runner dies.
"""

import contextlib
import ctypes
import importlib
import os
import runpy
import signal
import subprocess
import sys
import traceback

MODULES = (
    "torch",
    "torch.optim",
    "torchvision",
    "sklearn.datasets",
    "models",
    "utils.runs.training",
    "utils.runs.checkpoints",
    "utils.data.datasets",
    "utils.runs.options",
    "rainbow.sampling",
)
_SET_PARENT_DEATH_SIGNAL = 1


def warm_up():
    """Imports what the scripts import. What is missing is left to the script to complain about."""
    for module in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


class Process:
    """A script that runs. `poll`: its exit status (-N: killed by signal N), None while it runs. `send`: a signal."""

    def __init__(self, pid, popen=None):
        self.pid, self._popen, self._status = pid, popen, None

    def poll(self):
        if self._popen is not None:
            return self._popen.poll()
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def send(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)


def start_fresh(command, log, environment):
    """Starts `command` with its output in the open file `log`. Raises OSError."""
    parent = os.getpid()
    popen = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: _die_with(parent),
    )
    return Process(popen.pid, popen)


def start_warm(command, log, environment):
    """Starts `command` ([python, script, …]) in a fork of this process, its output in the open file `log`."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid)
    status = 1
    try:
        os.setsid()
        _die_with(parent)
        _become(command, log, environment)
        status = _run_script(command[1:])
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _become(command, log, environment):
    """Takes over the new process: signals, output, environment, arguments."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log.fileno(), 1), (log.fileno(), 2)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(command[1:])
    sys.path[0] = os.path.dirname(os.path.abspath(command[1]))


def _run_script(argv):
    """Runs a script as the main program. Returns its exit status."""
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _die_with(parent):
    """Asks the kernel, where it is Linux, for SIGTERM when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
