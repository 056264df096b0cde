"""Starting scripts as processes of their own: in a fresh interpreter, or in a fork of one that has its imports done.

Importing torch, torchvision and scikit-learn takes longer than training a small network on a laptop: `start_warm`
forks the standard library's fork server, which has imported them once. Either way the script has its own session, so
that Ctrl-C reaches it through the runner alone, and is told to stop (SIGTERM) when the runner dies.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection

# The scripts, what they import late, and what every child imports of this program.
PRELOADED = "main_block resample models.resnet torchvision sklearn.datasets utils.experiments.cluster".split()
_SET_PARENT_DEATH_SIGNAL = 1


class Process:
    """A script that runs: `pid`; `poll`, its exit status (-N: killed by signal N) or None; `send`, a signal."""

    def __init__(self, pid, poll):
        self.pid, self.poll = pid, poll

    def send(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)


def start_fresh(command, log, environment):
    """Starts `command` with its output in the open file `log`. Raises OSError."""
    parent = os.getpid()

    def die_with_parent():  # by the kernel, which only Linux does: the script knows nothing of its runner
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGTERM)

    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    popen = subprocess.Popen(command, **streams, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    return Process(popen.pid, popen.poll)


def start_warm(command, log, environment):
    """Starts `command` ([python, script, …]) in a fork that has its imports done, its output in the open file `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    output = Connection(os.dup(log.fileno()), readable=False)  # the kind of file that multiprocessing hands on
    process = context.Process(target=_become, args=(command[1:], output, environment))
    process.start()
    return Process(process.pid, lambda: process.exitcode)


def _become(argv, output, environment):
    """Turns the new process into the script. What goes wrong has its traceback in the log."""
    os.setsid()
    for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), output.fileno(), output.fileno())):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


def _stop_with_parent():
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
