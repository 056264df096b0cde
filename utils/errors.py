"""How a program ends: one clear line on stderr and a status that says why."""

import contextlib
import difflib
import errno
import io
import os
import signal
import sys
import tempfile
import traceback

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # of a disk that takes no more

DENIED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


class RunError(Exception):
    """An end that is explained in one line; `exit_status` is the program's."""

    exit_status = 1


class UserError(RunError, ValueError):
    """Bad input: what is wrong, where, and what would be right."""

    exit_status = 2


class DivergedError(RunError):
    """The loss is no longer a finite number."""

    exit_status = 3


class WriteError(RunError, OSError):
    """A file could not be written; whatever was there before is intact."""

    exit_status = 4


class StoppedError(RunError):
    """A signal ended the run, its state is saved. Status 128 + the signal's number, as a shell has it."""

    def __init__(self, message, signum=signal.SIGINT):
        super().__init__(message)
        self.exit_status = 128 + signum


@contextlib.contextmanager
def as_user_error(where="", kind=ValueError):
    """Turns an error with a message for the user, such as the `ValueError` of `models/`, into a `UserError`."""
    try:
        yield
    except RunError:
        raise
    except kind as error:
        raise UserError(f"{where}{error}") from error


def did_you_mean(word, known):
    """The end of a message on an unknown name: the known ones like it, or else the first few of them."""
    known = list(map(str, known))
    if close := difflib.get_close_matches(str(word), known, 3, 0.4):
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known[:8]) or 'none'}" + ", …" * (len(known) > 8)


def first_line(error):
    """What an error says in its first line, or its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def cause_of(error):
    """An error that is not explained, in one line: its type and what it says first."""
    text = " ".join(str(error).strip().partition("\n\n")[0].split())
    return f"{type(error).__name__}: {text[:400]}".removesuffix(": ")


def end_at_interrupts():
    """Ends the program at Ctrl-C without a word, while it imports: there is nothing to save. Until `run_main`."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_main(main, argv=None):
    """Runs `main(argv)` and exits; any error becomes one line, the traceback of one that is not explained a file.

    A disk that takes no more lines, or a reader that has gone, does not change the status; nor do closed streams, and
    characters that they cannot show.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed streams, whose numbers files would take
        pass
    os.close(number)
    program = _program()
    rank = os.environ.get("RANK", "0")
    prefix = program if rank == "0" else f"{program} (rank {rank})"
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            setattr(sys, name, _Stream(stream))
    try:
        status = main(argv)
    except RunError as error:
        complain(f"{prefix}: error: {error}")
        status = error.exit_status
    except KeyboardInterrupt:
        complain(f"{prefix}: interrupted")
        status = 128 + signal.SIGINT
    except Exception as error:
        status, text = _explained(error)
        complain(f"{prefix}: error: {text}")
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    sys.exit(status)


def _explained(error):
    """The status and the line for an error that nobody foresaw; its traceback goes to a file, unless a file is why."""
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if path is not None and number in FULL + DENIED:
        is_write = number in FULL or not os.path.exists(path) or os.access(path, os.R_OK)
        text = f"could not {'write' if is_write else 'read'} {path}: {error.strerror}"
        return (WriteError if is_write else UserError).exit_status, text
    text = cause_of(error)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
        text += f"; the traceback is in {file.name}"
    return (WriteError if number in FULL else RunError).exit_status, text


class _Stream(io.TextIOWrapper):
    """A standard stream that shows what it cannot encode as codes, and whose reader may go: the program goes on."""

    def __init__(self, stream):
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        encoding, number, buffer = stream.encoding, stream.fileno(), stream.detach()
        try:
            super().__init__(buffer, encoding, errors="backslashreplace", **how)
        except OSError:  # a file that has become a pipe, in a fork
            buffer = open(number, "wb", closefd=False)  # noqa: SIM115
            super().__init__(buffer, encoding, errors="backslashreplace", **how)

    def write(self, text):
        return self._despite(lambda: super(_Stream, self).write(text)) or 0

    def flush(self):
        self._despite(super().flush)

    def _despite(self, write):
        try:
            return write()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def _program():
    """The program as it was called: a script's name, or python -m PACKAGE."""
    name, spec = os.path.basename(sys.argv[0]), getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.parent}" if name == "__main__.py" and spec else name


def complain(text):
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _flush(stream):
    """Writes what is left; where that fails it goes nowhere, or Python would try again and change the status."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
