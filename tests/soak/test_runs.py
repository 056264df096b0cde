"""Several at once on one folder, several processes for one run, and runs that diverge."""

import re

import pytest
import torch

from tests.soak.programs import Program, assert_readable, assert_same, content, copy, run, sampling, training, wait_for


@pytest.mark.parametrize("script", ["main_block.py", "resample.py"])
def test_the_second_is_refused_and_told_who_is_first(script, trained, tmp_path, record_property):
    root = copy(trained, tmp_path / "root")
    trains = script == "main_block.py"
    command = training(root, "--epochs", "9999", name="long") if trains else sampling(root, "--num-repeats", "9999")
    with Program(command) as holder:
        wait_for(lambda: any(root.rglob("long/epoch_1.pt")) or any(root.rglob("checkpoint_repeat0.pt")))
        for _ in range(3):
            second = run(command, 2)
            assert f"{script}, process {holder.process.pid} on " in second.last_line, second.output
        assert holder.wait(0) is None
    record_property("starts on a folder in use refused, its holder named", 3)


@pytest.mark.parametrize("is_after_a_kill", [False, True])
@pytest.mark.parametrize("race", range(3))
def test_of_several_started_together_one_runs(race, is_after_a_kill, trained, tmp_path, record_property):
    if is_after_a_kill:
        with Program(training(tmp_path)) as program:
            wait_for(lambda: (tmp_path / "run" / "lock").exists(), pause=0)
            program.kill()
    programs = [Program(training(tmp_path)) for _ in range(3)]
    for program in programs:
        with program:
            program.wait()
    printed = [f"{program.status}: {program.output}" for program in programs]
    assert sum("epoch 12/12" in program.output for program in programs) == 1, printed
    assert all(program.status in (0, 2) and "Traceback" not in program.output for program in programs), printed
    run(training(tmp_path))
    assert_same(tmp_path, trained)
    record_property("races of three won by one, with the bits of an undisturbed run", 1)
    record_property("locks of killed processes taken", int(is_after_a_kill))


@pytest.mark.parametrize("size", [2, 3])
def test_sigterm_to_torchrun_ends_all_ranks_with_one_checkpoint(size, tmp_path, record_property):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", size]
    with Program([*torchrun, *training(tmp_path, "--epochs", "9999")]) as program:
        wait_for(lambda: (tmp_path / "run" / "epoch_1.pt").exists())
        program.process.terminate()
        assert program.wait() not in (0, None)
    status = content(tmp_path / "run" / "status.json")
    assert status["state"] == "stopped" and not (tmp_path / "run" / "lock").exists(), program.output
    run(training(tmp_path, "--epochs", status["epoch"] + 1))
    record_property("runs of several processes stopped by SIGTERM, and resumed by one", 1)


@pytest.mark.parametrize("network, lr", [("norm", "1e30"), ("parseval", "1e30"), ("vgg", "1e20")])
def test_a_loss_that_is_not_finite_ends_the_run(network, lr, tmp_path, record_property):
    command = training(tmp_path, "--lr", lr, network=network)
    ended, last = run(command, 3), content(tmp_path / "run" / "last.pt")
    assert re.search(r"epoch \d+, step \d+ of \d+: the loss is not a finite number", ended.last_line), ended.output
    assert f"the last checkpoint is of epoch {last['epoch']}" in ended.last_line
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert content(tmp_path / "run" / "status.json")["state"] == "failed"
    assert_readable(tmp_path)
    next(iter(last["state_dict"].values())).view(-1)[0] = torch.nan
    torch.save(last, tmp_path / "nan.pt")
    ended = run([*command, "--dir", "nan", "--resume", tmp_path / "nan.pt", "--restart"], 3)
    assert "validation after epoch 0, step 1" in ended.last_line, ended.output
    record_property("diverging runs ended with epoch and step, the last finite checkpoint kept", 2)
