"""The program as it is run: exit statuses, one-line errors, nothing left behind, kills, and several processes."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main_block
from tests.conftest import ROOT
from tests.golden_data import golden
from tests.training_runs import command, is_same, train, without_times
from utils import device
from utils.errors import UserError, run_main
from utils.lock import Lock
from utils.runs.checkpoints import load
from utils.runs.folder import RunFolder

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def status_of(argv):
    with pytest.raises(SystemExit) as ended:
        run_main(main_block.main, argv)
    return ended.value.code


# Mistakes


def truncated(path):
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize(
    "network, more, says",
    [
        ("norm", ["-a", "Fw Std Prr"], "did you mean 'Pr'"),
        ("norm", ["--n-blocks", "9", "--Pr-size", "4"], "too small"),
        ("norm", ["--Pr-size", "4", "8", "16"], "3 values for 2 blocks"),
        ("norm", ["--Pr-size", "0"], "0 is not a positive integer"),
        ("norm", ["-a", "mod Fw Std Pr"], "input is real"),
        ("norm", ["--resume", "missing.pt"], "missing.pt: no such checkpoint"),
        ("norm", ["--resume", "foreign.pt"], "no state_dict"),
        ("norm", ["--resume", "truncated.pt"], "truncated.pt: damaged"),
        ("norm", ["--resume", "other.pt", "--restart"], "other.pt: weights of another network"),
        ("norm", ["--dir", "../x"], "must stay inside checkpoints"),
        ("norm", ["--dir", "file/x"], "file/x: cannot be written"),
        ("norm", ["--device", "cuda"], "no usable CUDA GPU"),
        ("norm", ["--device", "tpu"], "--device tpu"),
        ("norm", ["--tf32"], "--tf32"),
        ("norm", ["--dataset", "mnist"], "not allowed with"),
        ("norm", ["--evaluate", "--dir", "nothing"], "no such checkpoint"),
        ("vgg", ["--arch", "resnet17-custom"], "resnet17-custom"),
    ],
)
def test_every_mistake_is_one_line_and_leaves_nothing(capsys, monkeypatch, network, more, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "epoch": 1}, "other.pt")
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "epoch": 1}, "truncated.pt")
    truncated("truncated.pt")
    Path("checkpoints").mkdir()
    Path("checkpoints/file").touch()
    before = sorted(Path().rglob("*"))
    assert status_of(command(network, "run", *more)) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and "error: " in captured.err
    assert sorted(Path().rglob("*")) == before


def test_mistakes_at_the_command_line_have_no_usage_dump():
    ended = subprocess.run(
        [sys.executable, ROOT / "main_block.py", "--digits", "-a", "Fw", "--lr", "fast"],
        capture_output=True,
        text=True,
        env=ONE_THREAD,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == (
        "main_block.py: error: argument --lr/--learning-rate: 'fast' is not a number of at least "
        "0 (--help lists all options)\n"
    )


def test_devices_are_picked_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto").type == "cuda" and device.pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="2 GPU"):
        device.pick_device("cuda:2")
    assert device.pick_device("cpu").type == "cpu"


# A folder's life


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
    anew = train("norm", "run", "--epochs", "1", "--lr", "0.01", "--overwrite")
    assert not is_same(anew, first) and len(anew["history"]) == 2


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
    anew = train("norm", "anew", "--resume", "whole", "--restart")
    assert [row["epoch"] for row in anew["history"]] == [0, 1, 2, 3]
    assert anew["history"][0]["val_loss"] == whole["history"][3]["val_loss"]
    with pytest.raises(UserError, match="nothing is left of --epochs 3"):
        train("norm", "more", "--resume", "whole")


def test_retraining_the_classifier_goes_on_exactly():
    train("norm", "trained", "--epochs", "1")
    start = ["--resume", "trained/last.pt", "--restart"]
    whole = train("frozen", "whole", *start)
    train("frozen", "run", *start, "--epochs", "1")
    assert is_same(train("frozen", "run", *start), whole)
    assert torch.equal(
        whole["state_dict"]["blocks.1.body.Pr.weight"],
        load("checkpoints/trained/last.pt")["state_dict"]["blocks.1.body.Pr.weight"],
    )


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


# Kills


@pytest.fixture(scope="module")
def started():
    """`with started(argv, …) as process:` is the program in a fork of a process that has imported it already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sklearn.datasets"])

    @contextlib.contextmanager
    def start(argv, environ=None, log="log"):
        process = context.Process(target=run_as_program, args=(argv, os.getcwd(), environ or {}, log))
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        context.Process(target=time.sleep, args=(0,)).start()  # the server starts in this environment
    return start


def run_as_program(argv, folder, environ, log):
    os.chdir(folder)
    os.environ.update(environ)
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_main(main_block.main, argv)


def test_killed_at_random_moments_a_run_ends_in_the_same_bits(started):
    began = time.monotonic()
    with started(command("norm", "whole", "--epochs", "8")) as process:
        process.join()
    whole, seconds = load("checkpoints/whole/last.pt"), time.monotonic() - began
    moments = random.Random(0)
    for _ in range(8):
        with started(command("norm", "run", "--epochs", "8")) as process:
            process.join(moments.uniform(0, seconds))
        for file in RunFolder("checkpoints", "run").path.glob("*.pt"):
            load(file)
    with started(command("norm", "run", "--epochs", "8")) as process:
        process.join()
    assert process.exitcode == 0
    assert is_same(load("checkpoints/run/last.pt"), whole)
    assert sorted(os.listdir("checkpoints/run")) == sorted(os.listdir("checkpoints/whole"))


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_program_with_a_checkpoint_one_line_and_its_status(started, signum, status):
    with started(command("norm", "run", "--epochs", "10000")) as process:
        while not Path("checkpoints/run/epoch_1.pt").exists():
            time.sleep(0.01)
        os.kill(process.pid, signum)
        process.join(30)
    assert process.exitcode == status
    folder = RunFolder("checkpoints", "run")
    assert folder.status()["state"] == "stopped" and not (folder.path / "lock").exists()
    assert Path("log").read_text().splitlines()[-1].endswith("state saved; rerun the same command to resume")


# Several processes


def run_ranks(started, size, argv):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(started(argv, {**environ, "RANK": str(r), "LOCAL_RANK": str(r)}, f"log{r}"))
            for r in range(size)
        ]
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * size, Path("log1").read_text()


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
def test_two_processes_give_the_losses_of_one_and_go_on_as_another_number(started, network, more):
    one = train(network, "one", *more)
    run_ranks(started, 2, command(network, "two", *more))
    two = load("checkpoints/two/last.pt")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert without_times(two).keys() == without_times(one).keys()
    if network == "norm":
        longer = train(network, "one", "--epochs", "4")
        run_ranks(started, 3, command(network, "two", "--epochs", "4"))
        assert losses(load("checkpoints/two/last.pt")) == pytest.approx(losses(longer), rel=1e-4)
        assert losses(train(network, "two", "--epochs", "5"))[:8] == pytest.approx(losses(longer)[:8], rel=1e-4)
        assert "it is not scaled" in Path("checkpoints/two/log.txt").read_text()


def test_torchrun_starts_it():
    one = train("norm", "one", "--epochs", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launch, str(ROOT / "main_block.py"), *command("norm", "two", "--epochs", "1")],
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert losses(load("checkpoints/two/last.pt")) == pytest.approx(losses(one), rel=1e-4)


def test_images_that_are_fewer_than_the_processes_are_left_out(started):
    train("complex", "one", "--batch-size", "199", "--epochs", "1")  # the last batch is a single image
    run_ranks(started, 2, command("complex", "two", "--batch-size", "199", "--epochs", "1"))
    assert "1 images of each epoch are left out" in Path("checkpoints/two/log.txt").read_text()
    assert load("checkpoints/two/last.pt")["history"][1]["val_loss"] < 2.4
