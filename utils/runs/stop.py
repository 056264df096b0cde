"""Requests to stop: SIGTERM of a scheduler, SIGHUP of a closed terminal, Ctrl-C."""

import contextlib
import os
import signal
import time
from threading import Thread

from utils.errors import StoppedError, complain

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 1.0  # seconds in which one request may come several times: torchrun passes on a Ctrl-C that all have had


class StopRequest:
    """A context in which the first request raises StoppedError or, `later`, is noted in `signum`. A second one ends
    the process at once, even if the main thread is deep in a library that does not look at signals."""

    def __init__(self):
        self.signum, self.is_later = None, False

    def __enter__(self):
        heeded = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self._before = {signum: signal.signal(signum, self._note) for signum in heeded}
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        Thread(target=_end_at_the_second, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)

    def _note(self, signum, frame):
        if self.signum is None:
            self.signum = signum
            if not self.is_later:
                raise StoppedError(f"stopped by {signal.Signals(signum).name}; rerun the same command", signum)

    @contextlib.contextmanager
    def later(self, is_later=True):
        """Whether requests are only noted in the context."""
        before, self.is_later = self.is_later, is_later
        try:
            yield
        finally:
            self.is_later = before

    def awaited(self, items):
        """The items, up to a request to stop that comes while one is waited for: that is obeyed at once."""
        items = iter(items)
        with contextlib.suppress(StoppedError):
            while True:
                with self.later(False):
                    item = next(items, None) if self.signum is None else None
                if item is None:
                    return
                yield item


def _end_at_the_second(reader):
    first = None
    with open(reader, "rb", buffering=0) as file:
        while received := file.read(1):
            if received[0] in SIGNALS:
                first = first or time.monotonic()
                if time.monotonic() - first > GRACE:
                    complain("asked a second time to stop: ended at once, without saving")
                    os._exit(128 + received[0])
