"""How a program ends, even if its last words cannot be written."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.errors import first_line

PROGRAM = """
from utils.errors import UserError, run_main
from utils.runs.log import RunLog

def main(argv):
    RunLog().say("a line")
    raise UserError("something is wrong")

run_main(main)
"""


def status(**streams):
    return subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=False, text=True, **streams)


def test_the_status_is_kept_if_nothing_can_be_printed():
    with open("/dev/full", "w") as full:
        ended = status(stdout=full, stderr=subprocess.PIPE)
        assert ended.returncode == 4 and ended.stderr.count("\n") == 1
        assert ended.stderr.endswith("could not write to the standard output: No space left on device\n")
        ended = status(stdout=subprocess.PIPE, stderr=full)
        assert (ended.returncode, ended.stdout) == (2, "a line\n")


CHATTER = """
import sys
from utils.errors import UserError, run_main

def main(argv):
    for i in range(20000):
        print("a line that nobody reads", i, flush=True)
    print("and the end", file=sys.stderr)
    return 3

run_main(main)
"""


FILES = """
import sys
from pathlib import Path
from utils.errors import run_main

run_main(lambda argv: Path(sys.argv[1]).mkdir(parents=True) or Path(sys.argv[1], "a").write_text("") or 0)
"""


@pytest.mark.parametrize("inside", ["file/folder", "file"])
def test_what_cannot_be_written_is_named_with_status_4_wherever_it_happens(tmp_path, inside):
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", FILES, str(tmp_path / inside)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 4 and ended.stderr.count("\n") == 1
    assert f"could not write {tmp_path}/file" in ended.stderr


def test_a_reader_that_goes_changes_nothing():
    process = subprocess.Popen(
        [sys.executable, "-c", CHATTER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "a line that nobody reads 0\n"
    process.stdout.close()
    assert process.stderr.read() == "and the end\n" and process.wait() == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("program", ["main_block.py", "resample.py", "run_exps.py", "-m utils.figures"])
def test_help_is_shown_in_any_encoding(program, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, *program.split(), "--help"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"") and len(ended.stdout) > 1000


def test_closed_streams_change_nothing():
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        command = f"{sys.executable} run_exps.py --scale laptop --print {closed}"
        assert subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, check=False).returncode == 0


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path):
    program = (
        "import sys; from utils.errors import run_main; run_main(lambda argv: open(sys.argv[1], 'w').fileno() < 3)"
    )
    command = f"{sys.executable} -c {shlex.quote(program)} {tmp_path / 'a'} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == 0


def test_an_error_names_the_program_as_it_was_called():
    ended = subprocess.run(
        [sys.executable, "-m", "utils.figures", "--figure", "99"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and ended.stderr.startswith("python -m utils.figures: error: "), ended.stderr


@pytest.mark.parametrize(
    "error, line, status",
    [
        ('KeyError("x")', "KeyError: 'x'", 1),
        ('ValueError("one\\n  two\\n\\nthree")', "ValueError: one two", 1),
        ("AssertionError()", "AssertionError", 1),
        ('OSError(28, "No space left on device")', "OSError: [Errno 28] No space left on device", 4),
    ],
)
def test_an_error_that_nobody_explains_is_one_line_and_its_traceback_a_file(error, line, status):
    program = f"from utils.errors import run_main\ndef main(argv):\n    raise {error}\nrun_main(main)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert ended.returncode == status and ended.stderr.count("\n") == 1
    start, _, file = ended.stderr.strip().partition("; the traceback is in ")
    assert start.endswith(f": error: {line}")
    assert "Traceback (most recent call last)" in Path(file).read_text()
    os.remove(file)


def test_an_error_has_a_first_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError"
    assert len(first_line(ValueError("x" * 1000))) == 200
