"""Locks: one holder at a time, named; free at once when it is killed; honoured across machines and without flock."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import lock
from utils.errors import UserError
from utils.lock import Lock, holder

PROGRAM = """
import os, sys, time
from utils import lock
lock.HEARTBEAT = 0.05
with lock.Lock(sys.argv[1]):
    {}
    print("held", flush=True)
    sys.stdin.read()
"""
FORK = "r, w = os.pipe(); os.fork() or (os.write(w, b'.'), time.sleep(1.5), os._exit(0)); os.read(r, 1)"
HERE = socket.gethostname()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


@pytest.fixture
def hold(path):
    """Starts a process that holds the lock until its input ends, after doing more if so wanted."""
    processes = []

    def hold(more="pass", wait=True):
        command = [sys.executable, "-c", PROGRAM.format(more), str(path)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
        assert not wait or processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def write(path, **changes):
    """A lock as a holder of another machine left it."""
    path.write_text(json.dumps({"program": "p.py", "pid": 7, "host": "elsewhere", "job": None, "key": "0", **changes}))


def assert_is_free(path):
    assert holder(path) is None
    with Lock(path):
        assert f"process {os.getpid()} on {HERE}" in holder(path)
    assert not os.listdir(path.parent) and holder(path) is None


def assert_is_held(path, who):
    assert who in holder(path)
    with pytest.raises(UserError, match=f"in use by .*{who}.*: wait for it or end it; .*{path}, lapses"), Lock(path):
        pass


def test_a_held_lock_is_refused_at_once_its_holder_named_and_then_given_back(path, hold):
    process = hold()
    assert_is_held(path, f"process {process.pid} on {HERE}")
    process.communicate()
    assert_is_free(path)


def test_the_lock_of_a_killed_process_is_free_at_once_even_if_it_had_forked(path, hold):
    process = hold(FORK)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped
    assert_is_free(path)


def test_one_of_several_that_start_together_wins(hold):
    processes = [hold(wait=False) for _ in range(4)]
    while sum(process.poll() is None for process in processes) > 1:
        time.sleep(0.02)
    for process in processes:
        process.communicate()
    assert sorted(process.returncode for process in processes) == [0, 1, 1, 1]


def test_asking_who_holds_a_lock_does_not_disturb_those_who_take_it(path):
    asking = "import sys\nfrom utils.lock import holder\nprint(flush=True)\nwhile True: holder(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", asking, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        for _ in range(200):
            with Lock(path):
                pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("who", [{}, {"host": HERE, "key": None, "started": "1"}], ids=["far", "old"])
def test_a_holder_out_of_reach_of_flock_is_honoured_until_it_is_silent(path, monkeypatch, who):
    """On another machine, or of an earlier version, which had no flock; the clock of this machine does not matter."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    write(path, **who)
    assert_is_held(path, "p.py, process 7")
    now = path.stat().st_mtime
    for touched in (now - 60, now + 86400):
        write(path, **who)
        os.utime(path, (touched, touched))
        assert_is_free(path)


def test_a_cluster_job_that_was_restarted_elsewhere_takes_its_own_lock(path, monkeypatch):
    write(path, job="77_0")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with Lock(path):
        pass


@pytest.mark.parametrize("content", ["", "[1]", '{"pid"', "\xff"])
def test_a_lock_file_that_names_nobody_is_no_lock(path, content):
    path.write_text(content, encoding="latin-1")
    assert_is_free(path)


def test_a_disk_without_flock_has_locks_that_end_with_silence(path, monkeypatch, hold):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    process = hold()
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(lock, "SILENCE", 2.0)
    monkeypatch.setattr(lock, "SETTLE", 0.1)
    assert_is_held(path, f"process {process.pid}")
    process.kill()
    time.sleep(2.5)
    assert_is_free(path)


@pytest.mark.parametrize("loss", [Path.unlink, write], ids=["removed", "taken"])
def test_a_process_that_has_lost_its_lock_ends_at_once(path, hold, loss):
    process = hold()
    loss(path)
    assert process.wait(timeout=20) == 1
    assert process.stderr.read().endswith("this process ends without saving\n")
