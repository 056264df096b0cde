"""One process at a time writes a run's folder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from utils.errors import UserError, WriteError

HEARTBEAT = 30.0  # seconds between two signs of life in a held lock
SILENCE = 600.0  # seconds without one after which a lock of another machine counts as stale


class Lock:
    """A lock file that names its holder: process, its start, machine. Use as a context manager.

    A lock is stale, and taken, if its process is dead, if it is of the same cluster job restarted elsewhere, or
    of another machine and silent for SILENCE seconds. Entering raises UserError, saying who holds it, otherwise.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.content = json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": process_start(os.getpid()),
                "job": _cluster_job(),
                "program": os.path.basename(sys.argv[0]),
            }
        )
        self._released = threading.Event()

    def __enter__(self):
        for _ in range(10):  # each round takes the lock, finds a live holder, or clears a stale one
            if self._create():
                self._clean()
                threading.Thread(target=self._show_life, daemon=True).start()
                return self
            content, age = self._read()
            if content is None:
                continue
            holder = _parse(content)
            if is_alive(holder, age):
                raise UserError(f"{self.path.parent} is in use by {describe(holder)}: wait for it or end it")
            self._clear(content)
        raise UserError(f"{self.path}: other processes take this lock again and again")

    def __exit__(self, *exception):
        self._released.set()
        if self._read()[0] == self.content:
            self.path.unlink(missing_ok=True)

    def _create(self):
        """Whether the lock file could be made: complete from its first moment, and only if there is none."""
        own = self._own_file()
        try:
            own.write_text(self.content)
            os.link(own, self.path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise WriteError(f"could not write {self.path}: {error.strerror or error}") from error
        finally:
            own.unlink(missing_ok=True)

    def _clean(self):
        """Removes what processes of this machine have left that were killed as they took the lock."""
        for file in self.path.parent.glob(f".{self.path.name}.{socket.gethostname()}.*.tmp"):
            pid = file.suffixes[-2][1:]
            if pid.isdigit() and process_start(int(pid)) is None:
                file.unlink(missing_ok=True)

    def _read(self):
        try:
            return self.path.read_text(), time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return None, 0.0

    def _clear(self, stale):
        """Takes the lock file away, and puts it back if another process has replaced the stale one meanwhile."""
        own = self._own_file()
        try:
            os.rename(self.path, own)
            if own.read_text() != stale and not self.path.exists():
                os.rename(own, self.path)
        except FileNotFoundError:
            return
        finally:
            own.unlink(missing_ok=True)

    def _own_file(self):
        return self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp")

    def _show_life(self):
        while not self._released.wait(HEARTBEAT):
            try:
                os.utime(self.path)
            except OSError:
                return


def is_alive(holder, age):
    """Whether the holder of a lock, `age` seconds after its last sign of life, must be believed to run."""
    if holder.get("host") == socket.gethostname():
        started = process_start(holder.get("pid"))
        return started is not None and started == holder.get("started")
    if holder.get("job") is not None and holder.get("job") == _cluster_job():
        return False
    return age < SILENCE


def describe(holder):
    """The holder of a lock in words."""
    return f"{holder.get('program')}, process {holder.get('pid')} on {holder.get('host')}"


def process_start(pid):
    """When the process began, in any unit (compare only); None if there is none or it is a dead one not yet reaped."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None


def _cluster_job():
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}" if job else None


def _parse(content):
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
