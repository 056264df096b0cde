"""Kills: programs that end at random moments, and what the next start makes of what they leave."""

import random
import signal
import time

import pytest

from tests.soak.programs import COMMANDS, Program, assert_readable, assert_same, content, copy, run, training, wait_for

KILLS = {"main_block.py": 8, "resample.py": 8, "run_exps.py": 4}  # of a run at most
# What a killed runner has started then gets SIGTERM: it may save once more, or die between its end and its lock's.
IGNORED = {"run_exps.py": ("previous.pt", "lock")}


@pytest.fixture(scope="module", params=COMMANDS)
def undisturbed(request, trained, tmp_path_factory):
    """A script, the folder it starts from, what it leaves if nothing disturbs it, and the seconds it needs."""
    start = trained if request.param == "resample.py" else tmp_path_factory.mktemp("empty")
    whole = copy(start, tmp_path_factory.mktemp("whole"))
    began = time.monotonic()
    run(COMMANDS[request.param](whole))
    return request.param, start, whole, time.monotonic() - began


def is_half_written(root):
    return any(path.name.endswith(".tmp") for path in root.rglob(".*"))


@pytest.mark.parametrize("seed", range(10))
def test_killed_programs_resume_and_end_in_the_same_bits(undisturbed, seed, tmp_path, record_property):
    (script, start, whole, seconds), draw, kills, aimed = undisturbed, random.Random(seed), 0, 0
    root = copy(start, tmp_path / "run")
    while kills < KILLS[script]:
        with Program(COMMANDS[script](root)) as program:
            moment, is_aimed = draw.uniform(0, seconds), draw.random() < 0.5
            program.wait(0.8 * moment if is_aimed else moment)
            if is_aimed:
                wait_for(lambda running=program: not running.process.is_alive() or is_half_written(root), pause=0)
            if program.wait(0) is not None:
                break
            program.kill(with_children=draw.random() < 0.5)
        kills, aimed = kills + 1, aimed + is_aimed
        assert_readable(root)
    run(COMMANDS[script](root))
    assert_same(root, whole, IGNORED.get(script, ()))
    record_property(f"kills of {script} survived", kills)
    record_property(f"kills of {script} survived with a file half-written", aimed)


@pytest.mark.parametrize("seed", range(10))
def test_sigterm_ends_a_training_with_its_state_saved(seed, trained, tmp_path, record_property):
    draw, stops = random.Random(seed), 0
    for epoch in [None, *sorted(draw.sample(range(12), 4))]:
        with Program(training(tmp_path)) as program:
            if epoch is not None:
                wait_for(lambda p=program, e=epoch: p.wait(0) is not None or f"epoch {e}/12" in p.output)
            time.sleep(draw.uniform(0, 0.05))
            program.process.terminate()
            program.wait(30)
        is_training = "/12 " in program.output and "epoch 12/12" not in program.output
        assert program.status in (0, 143, None if is_training else -signal.SIGTERM), program.output
        assert_readable(tmp_path)
        if program.status == 143:
            assert content(tmp_path / "run" / "status.json")["state"] == "stopped", program.output
            stops += 1
    run(training(tmp_path))
    assert_same(tmp_path, trained, ["previous.pt"])  # which may be that of a stop
    record_property("trainings stopped by SIGTERM, their state saved", stops)
