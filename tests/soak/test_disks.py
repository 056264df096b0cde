"""Disks: writes that fail, and checkpoints that are no longer what was written."""

import itertools
import random
import re
from functools import partial

import pytest

from tests.soak.programs import COMMANDS, assert_readable, assert_same, copy, fill_disk, run, training

FEW = {"main_block.py": ["--epochs", "1"], "resample.py": ["--num-repeats", "2"], "run_exps.py": []}
STEPS = {"run_exps.py": 6}  # for its experiments write a lot


@pytest.mark.parametrize("script", COMMANDS)
def test_every_write_may_fail(script, trained, tmp_path, record_property):
    """A program whose Nth write fails, for all N: it names the file, leaves all others whole, and resumes."""
    start = trained if script == "resample.py" else tmp_path / "empty"
    start.mkdir(exist_ok=True)
    whole, root, step = copy(start, tmp_path / "whole"), tmp_path / "run", STEPS.get(script, 1)
    run([*COMMANDS[script](whole), *FEW[script]])
    for count in itertools.count():
        command = [*COMMANDS[script](copy(start, root)), *FEW[script]]
        failed = run(command, 0, 1, 2, 4, setup=partial(fill_disk, 1 + count * step, root))
        full = re.search(r"full_disk: .*/(.*)", failed.output)
        if failed.status == 0:
            assert full is None and count > 3
            break
        judge(failed, script, root, full)
        assert_readable(root)
        run(command)
        assert_same(root, whole)
    record_property(f"writes of {script} failed, its next run ended in the same bits", count)


def judge(failed, script, root, full):
    """The program should have failed for the file that could not be written."""
    assert "Traceback" not in failed.output, failed.output
    if script == "run_exps.py":
        assert failed.status == 1 and ": failed, " in failed.output, failed.output
        return
    name = re.match(r"\.?(\w+)", full[1])[1]
    name = {"probe": "lock", "previous": "last"}.get(name, name)  # what is tried out, or moved out of the way, for it
    assert failed.status in (2, 4) and f"could not write {root}" in failed.last_line, failed.output
    assert f"/{name}" in failed.last_line, failed.output


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(seed, trained, tmp_path, record_property):
    root = copy(trained, tmp_path / "root")
    last = root / "run" / "last.pt"
    data = last.read_bytes()
    place = random.Random(seed).randrange(len(data))
    last.write_bytes(data[:place] + (data[place + 100 :] if seed % 2 else b""))
    assert "WARNING" in run(training(root)).output
    assert_same(root, trained)
    record_property("damaged checkpoints noticed, the run ended in the same bits", 1)
