"""What the whole trial shares, and its summary: the numbers that the tests record as properties, added up."""

from collections import Counter

import pytest

from tests.conftest import ROOT
from tests.soak.programs import run, training


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/soak" in item.nodeid:
            item.add_marker("soak")


def pytest_terminal_summary(terminalreporter):
    tried = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, count in report.user_properties:
            tried[name] += count
    for name, count in sorted(tried.items()):
        terminalreporter.write_line(f"{count:6,} {name}")


@pytest.fixture(scope="session", autouse=True)
def environment():
    """The server of programs starts in it: it finds the scripts, and computes with one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder that holds the finished training "run". Not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    run(training(root))
    return root
