"""One process at a time works in a run's folder.

The lock is the system's own (`flock`) on the file `lock`; it ends with its holder, however that ends. The file says who
holds it, and the holder touches it every few seconds, which decides where flock does not: on a disk that has none, and
between machines. Not `filelock`, whose versions before 4 leave a killed holder's lock to the workers it has forked, and
take a disk without flock for a lock that is held.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from utils.errors import UserError, WriteError, complain
from utils.files import read_json

HEARTBEAT = 5.0  # seconds between two signs of life of a holder
SILENCE = 45.0  # seconds without one after which a holder counts as dead, unless flock says that it lives
SETTLE = 1.0  # seconds in which several processes that take a lock without flock at once overwrite each other


class Lock:
    """The lock file at `path`, as a context manager. Entering raises UserError, naming the holder, or WriteError.

    A process whose lock is taken all the same (after a suspension, or by hand) ends at once, without saving.
    """

    def __init__(self, path):
        self.path, self._key = Path(path), os.urandom(8).hex()
        self._released = threading.Event()
        self._life = threading.Thread(target=self._show_life, daemon=True)

    def __enter__(self):
        try:
            self._file, has_flock = self._open()
            self._take(has_flock)
        except OSError as error:
            raise WriteError(f"could not write {self.path}: {error.strerror or error}") from error
        os.register_at_fork(after_in_child=self._file.close)  # or children would hold the lock as well
        self._life.start()
        return self

    def __exit__(self, *exception):
        if not self._file.closed:  # as it is in a forked child
            self._released.set()
            self._life.join()
            with self._file, contextlib.suppress(OSError):
                if self._is_mine():
                    self.path.unlink()

    def _open(self):
        """The open file, and whether this disk has flock, which then says that nobody here holds the lock."""
        for _ in range(10):  # a reader, or a process that just ends, has it for an instant
            file = self.path.open("a+")
            is_free = _flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if is_free is None or is_free and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file, is_free
            file.close()
            time.sleep(0.02)
        raise self._refusal(file)

    def _take(self, has_flock):
        """Writes this process into the file unless another one lives that holds it."""
        found, job = read_json(self.path, default={}), _cluster_job()
        is_dead = has_flock if _is_here(found) else job is not None and found.get("job") == job
        if found and not is_dead and not _is_silent(self.path):
            raise self._refusal(self._file)
        who = {"program": os.path.basename(sys.argv[0]), "pid": os.getpid(), "host": socket.gethostname()}
        self._file.truncate(0)
        self._file.write(json.dumps({**who, "job": job, "key": self._key}))
        self._file.flush()
        if not has_flock:
            time.sleep(SETTLE)
            if not self._is_mine():
                raise self._refusal(self._file)

    def _refusal(self, file):
        who = holder(self.path) or "another process"
        file.close()
        lapse = f"its lock, {self.path}, lapses at most {SILENCE:.0f} s after its end"
        return UserError(f"{self.path.parent} is in use by {who}: wait for it or end it; {lapse}")

    def _is_mine(self):
        """Whether the file still names this process. Raises OSError for a disk that does not answer."""
        try:
            return self._key in self.path.read_text(errors="replace")
        except FileNotFoundError:
            return False

    def _show_life(self):
        while not self._released.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if not self._is_mine():
                    how = f"taken by {holder(self.path) or 'another process'}" if self.path.exists() else "removed"
                    complain(f"{self.path} was {how}: this process ends without saving")
                    os._exit(1)
                os.utime(self._file.fileno())


def holder(path):
    """Who holds the lock at `path`, in words; None if nobody does. Disturbs neither holders nor those who take it."""
    try:
        with open(path) as file:
            is_free = _flock(file, fcntl.LOCK_SH)
        found = read_json(path, default={})
        is_held = is_free is False or found and not (is_free and _is_here(found)) and not _is_silent(path)
    except OSError:
        return None
    who = f"{found.get('program')}, process {found.get('pid')} on {found.get('host')}" if found else "another process"
    return who if is_held else None


def _is_silent(path):
    """Whether a lock was not touched for long, or in the future, by the clock of its disk if that can be told."""
    with open(path) as file:  # opened, or NFS would answer from memory
        touched = os.fstat(file.fileno()).st_mtime
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path)) as file:
            now = os.fstat(file.fileno()).st_mtime
    except OSError:
        now = time.time()
    return abs(now - touched) > SILENCE


def _flock(file, kind):
    """Takes the system's lock if it is free. Returns whether it was, None if the disk has no such locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def _is_here(found):
    """Whether a holder is of this machine and uses flock, as those of earlier versions do not."""
    return found.get("host") == socket.gethostname() and bool(found.get("key"))


def _cluster_job():
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}" if job else None
