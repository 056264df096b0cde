"""benchmarks/busy.py times the steps of its networks."""

import json
import sys

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import busy  # noqa: E402


def test_steps_are_timed(capsys):
    busy.steps(0.01)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2 and all(0 < seconds < 60 for seconds in found.values())
