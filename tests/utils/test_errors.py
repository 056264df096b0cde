"""How a program ends, even if its last words cannot be written."""

import subprocess
import sys

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


def test_an_error_has_a_first_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError"
    assert len(first_line(ValueError("x" * 1000))) == 200
