"""The program as it is run: exit statuses, one-line errors, nothing left behind, kills, and several processes."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import main_block
from tests.conftest import ROOT
from tests.golden_data import golden
from tests.soak.programs import SERVER, Program, wait_for
from tests.training_runs import command, is_same, train
from utils import device
from utils.errors import UserError, run_main
from utils.lock import Lock
from utils.runs.checkpoints import load
from utils.runs.folder import RunFolder

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.usefixtures("folder_of_its_own")


def status_of(argv):
    with pytest.raises(SystemExit) as ended:
        run_main(main_block.main, argv)
    return ended.value.code


@pytest.mark.parametrize(
    "network, more, says",
    [
        ("norm", "-a Prr", "did you mean 'Pr'"),
        ("norm", "--n-blocks 9 --Pr-size 4", "too small"),
        ("norm", "--Pr-size 4 8 16", "3 values for 2 blocks"),
        ("norm", "--Pr-size 0", "0 is not a positive integer"),
        ("complex", "--scat-non-linearity relu", "input is complex"),
        ("norm", "--resume missing.pt", "missing.pt: no such checkpoint"),
        ("norm", "--resume foreign.pt", "no state_dict"),
        ("norm", "--resume truncated.pt", "truncated.pt: damaged"),
        ("norm", "--resume other.pt --restart", "other.pt: weights of another network"),
        ("norm", "--dir ../x", "must stay inside checkpoints"),
        ("norm", "--dir file/x", "file/x: cannot be written"),
        ("norm", "--device cuda", "no usable CUDA device"),
        ("norm", "--device tpu", "--device tpu"),
        ("norm", "--tf32", "--tf32 requires a CUDA GPU"),
        ("norm", "--dataset mnist", "not allowed with"),
        ("norm", "--evaluate --dir nothing", "no such checkpoint"),
        ("vgg", "--arch resnet17-custom", "resnet17-custom"),
    ],
)
def test_every_mistake_is_one_line_and_leaves_nothing(capsys, monkeypatch, network, more, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.save({"weights": [torch.zeros(3)]}, "foreign.pt")
    for file in ("other.pt", "truncated.pt"):
        torch.save({"state_dict": {"a": torch.zeros(1000)}, "epoch": 1}, file)
    os.truncate("truncated.pt", 2000)
    Path("checkpoints").mkdir()
    Path("checkpoints/file").touch()
    before = sorted(Path().rglob("*"))
    assert status_of(command(network, "run", *more.split())) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and "error: " in captured.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "line, problem",
    [
        (
            "main_block.py --digits -a Fw --lr fast",
            "argument --lr/--learning-rate: 'fast' is not a number of at least 0 (--help lists all options)",
        ),
        ("resample.py --experiment run", "--experiment run: no such run in checkpoints; known: none"),
    ],
)
def test_mistakes_at_the_command_line_have_no_usage_dump(line, problem):
    script, *argv = line.split()
    ended = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True, text=True, env=ONE_THREAD)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{script}: error: {problem}\n")


def test_devices_are_picked_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto").type == "cuda" and device.pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="2 GPU"):
        device.pick_device("cuda:2")
    assert device.pick_device("cpu").type == "cpu"


def test_a_run_without_a_name_gets_one_and_a_finished_one_is_left_alone(capsys):
    argv = command("norm", "run", "--epochs", "1")
    del argv[argv.index("--dir") : argv.index("--dir") + 2]
    assert main_block.main(argv) == 0
    (folder,) = Path("checkpoints").iterdir()
    assert folder.name.startswith("digits-Fw-Std-Pr-N-")
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix == ".pt"}
    assert main_block.main([*argv, "--dir", folder.name]) == 0
    assert "already finished" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in folder.iterdir() if file.suffix == ".pt"}


def test_a_folder_is_not_lost_to_another_run():
    first = train("norm", "run", "--epochs", "1")
    with pytest.raises(UserError, match="holds a run with lr = 0.05, now 0.01: use --overwrite"):
        train("norm", "run", "--epochs", "1", "--lr", "0.01")
    assert is_same(load("checkpoints/run/last.pt"), first)
    other = train("norm", "run", "--epochs", "1", "--lr", "0.01", "--overwrite")
    assert not is_same(other, first) and len(other["history"]) == 2


def test_two_at_once_are_one_too_many(capsys):
    train("norm", "run", "--epochs", "1")
    with Lock(Path("checkpoints/run/lock")):
        assert status_of(command("norm", "run")) == 2
    assert f"process {os.getpid()} on {socket.gethostname()}" in capsys.readouterr().err
    train("norm", "run")


def test_a_checkpoint_of_an_epoch_starts_another_run():
    whole = train("norm", "whole")
    half = train("norm", "half", "--resume", "checkpoints/whole/epoch_2.pt")
    assert [row["epoch"] for row in half["history"]] == [2, 3]
    assert half["history"][0]["val_loss"] == whole["history"][2]["val_loss"]
    restarted = train("norm", "restarted", "--resume", "whole", "--restart")
    assert [row["epoch"] for row in restarted["history"]] == [0, 1, 2, 3]
    assert restarted["history"][0]["val_loss"] == whole["history"][3]["val_loss"]
    with pytest.raises(UserError, match="nothing is left of --epochs 3"):
        train("norm", "more", "--resume", "whole")


@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_a_checkpoint_of_a_narrower_network_gives_what_fits(restart):
    before = train("norm", "narrow", "--epochs", "1")["state_dict"]
    argv = ["--Pr-size", "4", "12", "--resume", "narrow", "--loose-resume", *restart]
    after = train("norm", "wide", *argv, "--lr", "0", "--wd", "0", "--epochs", "2")
    assert [row["epoch"] for row in after["history"]] == ([0, 1, 2] if restart else [1, 2])
    name = "blocks.0.body.Pr.weight"
    assert torch.equal(after["state_dict"][name], before[name])
    log = Path("checkpoints/wide/log.txt").read_text()
    assert "what did not fit is left out: blocks.1.body.Pr.weight is 8×20, expected 12×20" in log


def test_retraining_the_classifier_resumes_exactly():
    trained = train("norm", "trained", "--epochs", "1")
    start = ["--resume", "trained/last.pt", "--restart"]
    whole = train("frozen", "whole", *start)
    train("frozen", "run", *start, "--epochs", "1")
    train("frozen", "run", "--resume", "checkpoints/run/last.pt", "--epochs", "2")  # its own: the run it was before
    assert is_same(train("frozen", "run", *start), whole)
    weight = "blocks.1.body.Pr.weight"
    assert torch.equal(whole["state_dict"][weight], trained["state_dict"][weight])


def test_evaluation_prints_what_training_measured(capsys):
    last = train("norm", "run", "--epochs", "2")
    for more in (["--dir", "run"], ["--dir", "other", "--resume", "run"]):
        capsys.readouterr()
        assert main_block.main(command("norm", "run", *more, "--evaluate")) == 0
        printed = capsys.readouterr().out
        assert f"top-1 {last['history'][-1]['val_acc1']:.2f} %" in printed and "after epoch 2" in printed
    assert not Path("checkpoints/other").exists()


@pytest.mark.parametrize(
    "name, status, says", [("J4-norm-x-grayscale", 0, "after epoch 3"), ("J4-plain", 2, "expected")]
)
def test_checkpoints_of_the_original_are_evaluated_on_images_of_their_kind(capsys, name, status, says):
    """The digits have one channel, as one of the two networks."""
    argv = [arg for arg in golden(name)["argv"] if arg != "--cifar10"]
    torch.save({"state_dict": golden(name)["state_dict"], "epoch": 3, "best_acc1": torch.tensor(10.0)}, "best.pth.tar")
    argv += ["--digits", "--resize-images", "32", "--resume", "best.pth.tar", "--evaluate", "--device", "cpu"]
    assert status_of(argv) == status
    assert says in "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def started():
    """`with started(argv, environ) as program:` is the program at work in the working directory, with one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        SERVER.Process(target=time.sleep, args=(0,)).start()  # the server starts in this environment
    return lambda argv, **environ: Program([ROOT / "main_block.py", *argv], partial(place, os.getcwd(), environ))


def place(folder, environ):
    os.chdir(folder)
    os.environ.update(environ)
    torch.set_num_threads(1)


def test_killed_at_random_moments_a_run_ends_in_the_same_bits(started):
    began = time.monotonic()
    with started(command("norm", "whole", "--epochs", "8")) as program:
        program.wait()
    whole, seconds = load("checkpoints/whole/last.pt"), time.monotonic() - began
    moments = random.Random(0)
    for _ in range(8):
        with started(command("norm", "run", "--epochs", "8")) as program:
            program.wait(moments.uniform(0, seconds))
        for file in RunFolder("checkpoints", "run").path.glob("*.pt"):
            load(file)
    with started(command("norm", "run", "--epochs", "8")) as program:
        assert program.wait() == 0
    assert is_same(load("checkpoints/run/last.pt"), whole)
    assert sorted(os.listdir("checkpoints/run")) == sorted(os.listdir("checkpoints/whole"))


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_program_with_a_checkpoint_one_line_and_its_status(started, signum, status):
    with started(command("norm", "run", "--epochs", "10000")) as program:
        wait_for(Path("checkpoints/run/epoch_1.pt").exists)
        os.kill(program.process.pid, signum)
        assert program.wait(30) == status
    folder = RunFolder("checkpoints", "run")
    assert folder.status()["state"] == "stopped" and not (folder.path / "lock").exists()
    assert program.last_line.endswith("state saved; rerun the same command to resume")


def run_ranks(started, size, argv):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    with contextlib.ExitStack() as stack:
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size))
        for program in [stack.enter_context(started(argv, **environ, **rank)) for rank in ranks]:
            assert program.wait(120) == 0, program.output


def losses(checkpoint):
    return [row[key] for row in checkpoint["history"] for key in ("train_loss", "val_loss") if row[key] is not None]


@pytest.mark.parametrize(
    "network, more",
    [
        ("norm", []),
        ("complex", ["--batch-size", "61"]),
        ("vgg", ["--arch", "resnet18-custom", "--standard-width-scaling", "0.1", "--lr", "0.001", "--epochs", "1"]),
    ],
)
def test_processes_give_the_losses_of_one_and_another_number_of_them_resumes(started, network, more):
    one = train(network, "one", *more)
    run_ranks(started, 2, command(network, "two", *more))
    two = load("checkpoints/two/last.pt")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two.keys() == one.keys()
    if network == "norm":
        longer = train(network, "one", "--epochs", "4")
        run_ranks(started, 3, command(network, "two", "--epochs", "4"))
        assert losses(load("checkpoints/two/last.pt")) == pytest.approx(losses(longer), rel=1e-4)
        assert losses(train(network, "two", "--epochs", "5"))[:8] == pytest.approx(losses(longer)[:8], rel=1e-4)
        assert "it is not scaled" in Path("checkpoints/two/log.txt").read_text()


def test_torchrun_starts_it():
    one = train("norm", "one", "--epochs", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*launch, str(ROOT / "main_block.py"), *command("norm", "two", "--epochs", "1")]
    ended = subprocess.run(argv, capture_output=True, text=True, env=ONE_THREAD, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert losses(load("checkpoints/two/last.pt")) == pytest.approx(losses(one), rel=1e-4)


def test_images_that_are_fewer_than_the_processes_are_left_out(started):
    train("complex", "one", "--batch-size", "199", "--epochs", "1")  # the last batch is a single image
    run_ranks(started, 2, command("complex", "two", "--batch-size", "199", "--epochs", "1"))
    assert "1 images of each epoch are left out" in Path("checkpoints/two/log.txt").read_text()
    assert load("checkpoints/two/last.pt")["history"][1]["val_loss"] < 2.4
