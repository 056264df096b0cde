"""The program as it is run: exit statuses, one-line errors, nothing left behind, kills, and several processes."""

import contextlib
import errno
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

import main_block
from tests.conftest import ROOT
from tests.golden_data import golden
from tests.soak.programs import SERVER, Program, wait_for
from tests.training_runs import command, is_same, train
from utils import device
from utils.data.memory import MemorySet
from utils.errors import StoppedError, UserError, run_main
from utils.lock import Lock
from utils.runs import ranks
from utils.runs.checkpoints import load
from utils.runs.folder import RunFolder
from utils.runs.training import Training

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


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 4), (errno.EROFS, 4), (errno.EACCES, 4), (errno.EEXIST, 2)])
def test_a_folder_that_cannot_be_made_is_a_write_error(monkeypatch, capsys, number, status):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert status_of(command("norm", "run")) == status
    assert "checkpoints/run: cannot be written" in capsys.readouterr().err


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
    """Puts a process there; STEP, if set for its rank, is what its third step of training does: raise, wait, die."""
    os.chdir(folder)
    os.environ.update(environ)
    torch.set_num_threads(1)
    steps, step = itertools.count(1), Training.train_step

    def third_step(self, *batch):
        if next(steps) == 3 and environ.get("RANK", "1") == "1":
            ACTIONS[environ["STEP"]]()
        return step(self, *batch)

    if "STEP" in environ:
        Training.train_step = third_step


def fail():
    raise KeyError("made to fail\nwith more lines")


ACTIONS = {"raise": fail, "wait": lambda: Event().wait(), "die": lambda: os.kill(os.getpid(), signal.SIGKILL)}


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


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_program_with_a_checkpoint_one_line_and_its_status(started, signum, status):
    with started(command("norm", "run", "--epochs", "10000")) as program:
        wait_for(Path("checkpoints/run/epoch_1.pt").exists)
        os.kill(program.process.pid, signum)
        assert program.wait(30) == status
    folder = RunFolder("checkpoints", "run")
    assert folder.status()["state"] == "stopped" and not (folder.path / "lock").exists()
    assert program.last_line.endswith("state saved; rerun the same command to resume")


def test_a_second_request_ends_a_process_that_waits_for_ever(started):
    with started(command("norm", "run", "--epochs", "2"), STEP="wait") as program:
        wait_for(Path("checkpoints/run/epoch_0.pt").exists)
        time.sleep(1)
        os.kill(program.process.pid, signal.SIGTERM)
        assert program.wait(1.5) is None
        os.kill(program.process.pid, signal.SIGTERM)
        assert program.wait(30) == 143
    assert program.last_line == "asked a second time to stop: ended at once, without saving"


def test_a_request_is_obeyed_while_data_are_waited_for(monkeypatch):
    whole = train("norm", "whole", "--epochs", "1")
    batches = MemorySet.batches

    def slow(self, loader):
        for index, batch in enumerate(batches(self, loader)):
            if index == 2 and loader.key:
                Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                Event().wait()
            yield batch

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="epoch 1, step 2 of 4; state saved"):
        patch.setattr(MemorySet, "batches", slow)
        train("norm", "run", "--epochs", "1")
    assert is_same(train("norm", "run", "--epochs", "1"), whole)


@pytest.mark.parametrize("program", ["main_block.py", "resample.py", "-m utils.figures"])
def test_ctrl_c_while_a_program_imports_ends_it_without_a_word(program):
    argv = [sys.executable, *program.split(), "--help"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[0], process.returncode) == ("", -signal.SIGINT)


def test_a_request_before_there_is_anything_to_save_ends_the_program(monkeypatch):
    monkeypatch.setattr(main_block, "load_datasets", lambda args: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(StoppedError, match="stopped by SIGHUP; rerun the same command") as stopped:
        main_block.main(command("norm", "run"))
    assert stopped.value.exit_status == 129 and os.listdir() == []


def test_an_error_of_a_library_is_one_line_and_its_traceback_is_in_the_log(started):
    with started(command("norm", "run"), STEP="raise") as program:
        assert program.wait(60) == 1
    cause, log = "KeyError: 'made to fail\\nwith more lines'", Path("checkpoints/run/log.txt")
    assert program.last_line == f"main_block.py: error: {cause}; the traceback is in checkpoints/run/log.txt"
    assert "Traceback" not in program.output and "in fail\n    raise KeyError" in log.read_text()
    status = RunFolder("checkpoints", "run").status()
    assert (status["state"], status["message"]) == ("failed", cause)


@pytest.mark.parametrize(
    "step, cause", [("raise", "made to fail"), ("die", "another process of this training has died")]
)
def test_if_one_process_fails_all_end_and_the_first_cause_is_noted(started, step, cause):
    run_ranks(started, 2, command("norm", "run"), 1, STEP=step)
    status = RunFolder("checkpoints", "run").status()
    assert status["state"] == "failed" and cause in status["message"]


def test_a_refusal_of_the_main_process_is_that_of_all(started):
    with Lock(make_folder("checkpoints/run") / "lock"):
        run_ranks(started, 2, command("norm", "run"), 2)
    assert os.listdir("checkpoints/run") == []


def make_folder(path):
    Path(path).mkdir(parents=True)
    return Path(path)


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1),
        ({"WORLD_SIZE": " ", "RANK": "", "LOCAL_RANK": "0"}, 1),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start .* with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}, "without MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: should be integers"),
        ({"WORLD_SIZE": "-2"}, "should be integers"),
        ({"WORLD_SIZE": "0"}, "no such process among 0"),
        ({"RANK": "3"}, "RANK=3: there is no such process among 1"),
    ],
)
def test_variables_that_torchrun_has_not_set_are_a_single_process_or_explained(environ, expected):
    if isinstance(expected, int):
        assert ranks.join("cpu", environ).size == expected
    else:
        with pytest.raises(UserError, match=expected):
            ranks.join("cpu", environ)


def run_ranks(started, size, argv, status=0, **more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), **more}
    with contextlib.ExitStack() as stack:
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size))
        for program in [stack.enter_context(started(argv, **environ, **rank)) for rank in ranks]:
            assert program.wait(120) in (status, -signal.SIGKILL * bool(status)), program.output
            assert "Traceback" not in program.output


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
