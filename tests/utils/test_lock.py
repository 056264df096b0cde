"""Locks: one holder at a time, named; free at once when it is killed; honoured across machines and without flock."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import lock
from utils.errors import UserError
from utils.lock import Lock

PROGRAM = """
import os, sys, time
from utils import lock
lock.HEARTBEAT = 0.05
with lock.Lock(sys.argv[1]):
    {}
    print("held", flush=True)
    time.sleep(60)
"""
FORK = "r, w = os.pipe(); os.fork() or (os.write(w, b'.'), time.sleep(1.5), os._exit(0)); os.read(r, 1)"


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the lock, after doing more if so wanted."""
    processes = []

    def start(more="pass"):
        command = [sys.executable, "-c", PROGRAM.format(more), str(tmp_path / "lock")]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def hurried(monkeypatch):
    for name, seconds in (("SILENCE", 0.5), ("SETTLE", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)


def write(path, **changes):
    """A lock as a holder of another machine left it."""
    path.write_text(json.dumps({"program": "p.py", "pid": 7, "host": "elsewhere", "job": None, "key": "0", **changes}))


def test_a_held_lock_is_refused_at_once_and_its_holder_named(tmp_path, hold):
    who = f"-c, process {hold().pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=f"in use by {who}: wait for it"), Lock(tmp_path / "lock"):
        pass
    assert lock.holder(tmp_path / "lock") == who


def test_a_lock_is_given_back(tmp_path):
    for _ in range(2):
        with Lock(tmp_path / "lock"):
            assert f"process {os.getpid()} on" in lock.holder(tmp_path / "lock")
        assert not os.listdir(tmp_path) and lock.holder(tmp_path / "lock") is None


def test_the_lock_of_a_killed_process_is_free_at_once_even_if_it_had_forked(tmp_path, hold):
    process = hold(FORK)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped
    assert lock.holder(tmp_path / "lock") is None
    with Lock(tmp_path / "lock"):
        pass


def test_one_of_several_that_start_together_wins(tmp_path):
    program = "import sys, time; from utils.lock import Lock\nwith Lock(sys.argv[1]): time.sleep(2)"
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    started = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert sorted(process.wait() for process in started) == [0, 1, 1, 1]


def test_asking_who_holds_a_lock_does_not_disturb_those_who_take_it(tmp_path):
    end = threading.Event()

    def ask():
        while not end.is_set():
            lock.holder(tmp_path / "lock")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(100):
            with Lock(tmp_path / "lock"):
                pass
    finally:
        end.set()
        asking.join()


@pytest.mark.parametrize("who", [{}, {"host": socket.gethostname(), "key": None, "started": "1"}], ids=["far", "old"])
def test_a_holder_out_of_reach_of_flock_is_honoured_until_it_is_silent(tmp_path, monkeypatch, who):
    """On another machine, or of an earlier version, which had no flock; the clock of this machine does not matter."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    path = tmp_path / "lock"
    write(path, **who)
    with pytest.raises(UserError, match=f"in use by p.py, process 7 .*{path}, lapses at most 45 s"), Lock(path):
        pass
    assert "p.py, process 7" in lock.holder(path)
    now = path.stat().st_mtime
    for touched in (now - 60, now + 86400):
        write(path, **who)
        os.utime(path, (touched, touched))
        assert lock.holder(path) is None
        with Lock(path):
            pass


def test_a_cluster_job_that_was_restarted_elsewhere_takes_its_own_lock(tmp_path, monkeypatch):
    write(tmp_path / "lock", job="77_0")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with Lock(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("content", ["", "[1]", '{"pid"', "\xff"])
def test_a_lock_file_that_names_nobody_is_no_lock(tmp_path, content):
    (tmp_path / "lock").write_text(content, encoding="latin-1")
    assert lock.holder(tmp_path / "lock") is None
    with Lock(tmp_path / "lock"):
        pass


def test_a_disk_without_flock_has_locks_that_end_with_silence(tmp_path, hurried, without_flock, hold):
    process = hold()
    with pytest.raises(UserError, match=f"process {process.pid}"), Lock(tmp_path / "lock"):
        pass
    process.kill()
    time.sleep(0.6)
    with Lock(tmp_path / "lock"):
        assert "process" in lock.holder(tmp_path / "lock")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("loss", [Path.unlink, write], ids=["removed", "taken"])
def test_a_process_that_has_lost_its_lock_ends_at_once(tmp_path, hold, loss):
    process = hold()
    loss(tmp_path / "lock")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and errors.endswith("this process ends without saving\n")
