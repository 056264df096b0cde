"""A run is a function of its command: the same seed gives the same bits, whatever interrupts it in between."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import main_block
import models
from models.signal import Signal
from tests.conftest import ROOT
from tests.training_runs import NETWORKS, STEPS, command, is_same, train
from utils.errors import DivergedError, StoppedError, UserError, WriteError
from utils.runs import options, session
from utils.runs.checkpoints import load
from utils.runs.folder import RunFolder
from utils.runs.networks import network_config
from utils.runs.ranks import World
from utils.runs.scores import Score, Tally
from utils.runs.state import make_optimizer
from utils.runs.training import Training

pytestmark = pytest.mark.usefixtures("folder_of_its_own")


@pytest.fixture
def at_call(monkeypatch):
    """`at_call(n, method, action)`: the n-th call (from 1) of a method of Training or `owner` starts with `action`."""

    def arrange(number, method, action, owner=Training):
        original, count = getattr(owner, method), itertools.count(1)

        def counted(self, *args):
            if next(count) == number:
                action(*args)
            return original(self, *args)

        monkeypatch.setattr(owner, method, counted)

    return arrange


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_interrupted_anywhere_ends_in_the_same_bits(network, at_call):
    whole = train(network, "whole")
    for number in (1, 2, STEPS, STEPS + 1, 2 * STEPS + 3) if network in ("norm", "complex") else (STEPS - 1,):
        at_call(number, "train_step", terminate)
        with pytest.raises(StoppedError) as stopped:
            train(network, f"at{number}")
        assert stopped.value.exit_status == 143
        assert is_same(train(network, f"at{number}"), whole), number


@pytest.mark.parametrize("network", ["norm", "frozen", "complex"])
def test_a_run_continued_after_any_epoch_ends_in_the_same_bits(network):
    whole = train(network, "whole")
    for epoch in range(3):
        name = f"first{epoch}"
        train(network, name, "--epochs", str(epoch))
        assert is_same(train(network, name), whole)
    for file in ("epoch_0.pt", "epoch_1.pt", "epoch_2.pt", "best.pt"):
        assert is_same(load(f"checkpoints/{name}/{file}"), load(f"checkpoints/whole/{file}"))


ENDS = [(1, "validate", Training), (3, "validate", Training), (3, "save_last", RunFolder)]


@pytest.mark.parametrize("number, method, owner", ENDS)
def test_a_run_ended_as_it_validates_or_between_two_files_resumes_exactly(at_call, number, method, owner):
    whole = train("norm", "whole")
    at_call(number, method, terminate if owner is Training else lambda *_: sys.exit(), owner)
    with pytest.raises((StoppedError, SystemExit)):
        train("norm", "ended")
    assert is_same(train("norm", "ended"), whole)


def test_a_run_started_by_the_first_version_resumes():
    """Stopped by a signal in its second epoch, after two of four steps, before options were records."""
    shutil.copytree(ROOT / "tests/utils/runs/interrupted", "checkpoints/run")
    stopped = load("checkpoints/run/last.pt")
    finished = train("norm", "run")
    assert "resumed after epoch 1, step 2" in Path("checkpoints/run/log.txt").read_text()
    assert finished["history"][:2] == stopped["history"] and len(finished["history"]) == 4
    assert finished["args"].items() >= stopped["args"].items() and finished.keys() >= stopped.keys()


def test_the_same_words_resume_a_run_as_they_were_read_when_it_started():
    """The first version took one value of a list for all blocks."""
    shutil.copytree(ROOT / "tests/utils/runs/interrupted", "checkpoints/run")
    words = json.loads(Path("checkpoints/run/args.json").read_text())["argv"]
    assert words[words.index("--scat-angles") + 1 :][:2] == ["4", "--classifier-batch-norm"]
    assert main_block.main(words) == 0
    assert load("checkpoints/run/last.pt")["args"]["scat_angles"] == [4, 4]
    with pytest.raises(UserError, match=r"scat_angles = \[4, 4\], now \[4, 8\]"):
        main_block.main([*words, "--momentum", "0.9"])


def test_the_seed_decides_every_bit():
    first = train("norm", "a", "--epochs", "1")
    assert is_same(train("norm", "b", "--epochs", "1"), first)
    other = train("norm", "c", "--epochs", "1", "--seed", "1")
    for epoch in (0, 1):
        a, c = (load(f"checkpoints/{name}/epoch_{epoch}.pt")["state_dict"] for name in "ac")
        assert not torch.equal(a["blocks.0.body.Pr.weight"], c["blocks.0.body.Pr.weight"])
    assert other["history"][0]["val_loss"] != first["history"][0]["val_loss"]


def test_frozen_projections_stay_and_the_classifier_learns():
    train("frozen", "run")
    start, end = (load(f"checkpoints/run/{name}.pt")["state_dict"] for name in ("epoch_0", "last"))
    assert torch.equal(start["blocks.1.body.Pr.weight"], end["blocks.1.body.Pr.weight"])
    assert not torch.equal(start["classifier.linear.weight"], end["classifier.linear.weight"])
    assert not torch.equal(start["blocks.1.body.Std.mean"], end["blocks.1.body.Std.mean"])


def test_the_tally_is_the_mean_over_images_and_finds_the_first_bad_step():
    logits, labels = torch.randn(3, 20, 7), torch.randint(7, (3, 20))
    tally, world = Tally(3, torch.device("cpu")), World(torch.device("cpu"))
    for step in range(3):
        tally.add(step, logits[step], labels[step], F.cross_entropy(logits[step], labels[step], reduction="sum"))
    score, bad = tally.score(3, world)
    ranks = (logits >= logits.gather(2, labels[..., None])).sum(2)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    acc1, acc5 = (100 * (ranks <= k).double().mean().item() for k in (1, 5))
    assert vars(score) == pytest.approx(vars(Score(loss, acc1, acc5, 60)), rel=1e-6) and bad is None
    tally.rows[1, 0] = math.nan
    assert tally.score(3, world)[1] == 2


def test_a_run_leaves_what_is_needed_to_understand_it():
    last = train("norm", "group/run")
    folder = RunFolder("checkpoints", "group/run")
    rows = list(csv.DictReader((folder.path / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"] and rows[0]["train_loss"] == ""
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.05, 0.05, 0.05, 0.005])
    assert float(rows[-1]["val_acc1"]) == pytest.approx(last["history"][-1]["val_acc1"])
    status = folder.status()
    assert status["state"] == "finished" and status["epoch"] == status["epochs"] == 3
    assert status["best_acc1"] == max(row["val_acc1"] for row in last["history"]) == last["best_acc1"]
    about = folder.description()
    assert about["argv"] == command("norm", "group/run") and about["seed"] == 0 and "torch" in about["versions"]
    assert about["parameters"] == {"total": 4 * 5 + 8 * 20 + 10 * 32 * 4, "learned": 4 * 5 + 8 * 20 + 10 * 32 * 4}
    assert folder.args().Pr_size == [4, 8] and about["args"]["input_shape"] == [1, 8, 8]
    assert "epoch 3/3" in (folder.path / "log.txt").read_text()
    records, checkpoints = "args.json metrics.csv log.txt status.json", "last best previous epoch_0 epoch_1 epoch_2"
    expected = {*records.split(), *(f"{name}.pt" for name in checkpoints.split())}
    assert {file.name for file in folder.path.iterdir()} == expected


def test_no_epochs_still_leave_the_untrained_network():
    assert train("norm", "run", "--epochs", "0")["epoch"] == 0
    assert RunFolder("checkpoints", "run").epochs() == [0]
    assert RunFolder("checkpoints", "run").status()["state"] == "finished"


def test_regularised_weights_have_no_decay_and_others_have():
    args = options.parse(command("parseval", "run", "--wd", "0.1"), {})
    network = models.build(network_config(args, Signal(1, 8, 8), 10))
    groups = make_optimizer(network, args).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(network.blocks[0].P.weight)] == 0 and decays[id(network.classifier.linear.weight)] == 0.1


def test_curves_for_tensorboard():
    pytest.importorskip("tensorboard")
    train("norm", "run", "--epochs", "1", "--tensorboard")
    assert list(RunFolder("checkpoints", "run").path.glob("tensorboard/events*"))


def test_ctrl_c_ends_with_130(at_call):
    at_call(3, "train_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError, match="step 3 of 4") as stopped:
        train("norm", "run")
    assert stopped.value.exit_status == 130
    assert RunFolder("checkpoints", "run").status()["state"] == "stopped"


@pytest.mark.parametrize("print_freq", [1, 1000])
def test_divergence_names_epoch_and_step_and_keeps_the_last_good_checkpoint(at_call, print_freq):
    at_call(STEPS + 3, "train_step", lambda images, labels: images.fill_(math.nan))
    with pytest.raises(DivergedError, match="epoch 2, step 3 of 4") as diverged:
        train("norm", "run", "--print-freq", str(print_freq))
    assert diverged.value.exit_status == 3
    folder = RunFolder("checkpoints", "run")
    last, status = folder.checkpoint(), folder.status()
    assert last["epoch"] == 1 and last["step"] == 0
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert status["state"] == "failed" and "step 3 of 4" in status["message"]


@pytest.mark.parametrize("file", ["epoch_1.pt", "best.pt", "metrics.csv", "last.pt", "status.json", "args.json"])
def test_every_file_may_fail_to_be_written_once(monkeypatch, file):
    """Writing after the first epoch fails: what was there is intact, the file is named, the run can be resumed."""
    whole = train("norm", "whole")
    train("norm", "run", "--epochs", "0")
    replace = os.replace

    def failing(source, target):
        if os.path.basename(target) == file:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(WriteError, match=rf"{file}: No space left on device") as error:
        train("norm", "run")
    assert error.value.exit_status == 4
    monkeypatch.setattr(os, "replace", replace)
    for path in Path("checkpoints/run").iterdir():
        (json.loads(path.read_text()) if path.suffix == ".json" else path.suffix != ".pt" or load(path))
    assert is_same(train("norm", "run"), whole)


@pytest.mark.parametrize("network", ["norm", "vgg"])
def test_bfloat16_learns_and_keeps_weights_and_statistics_in_float32(network):
    last = train(network, "run", "--amp")
    assert last["history"][-1]["train_loss"] < last["history"][1]["train_loss"]
    assert all(value.dtype == torch.float32 for key, value in last["state_dict"].items() if "num_batches" not in key)


@pytest.mark.parametrize("more", ["", "--amp", "--standard-batch-norm none --lr 1e-5"])
def test_a_narrow_resnet_does_a_step_on_large_images(more):
    """With channels last in memory, 1×1 convolutions of stride 2 with 8 channels end the process on AVX-512."""
    argv = "--digits --data-subset 0:1 --arch resnet18-custom --standard-width-scaling 0.125 --resize-images 224"
    assert main_block.main(f"{argv} --epochs 1 --device cpu --dir run {more}".split()) == 0


def test_a_compiled_network_trains_the_same_weights_under_the_same_names(monkeypatch):
    plain = train("norm", "plain", "--epochs", "1")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or torch.nn.Sequential(module))
    assert is_same(train("norm", "run", "--epochs", "1", "--compile"), plain) and len(compiled) == 2


@pytest.mark.parametrize("tf32, products, convolutions", [(True, "high", True), (False, "highest", True)])
def test_tf32_is_set_as_asked(monkeypatch, tf32, products, convolutions):
    """In convolutions by default, as PyTorch has it; nowhere in the analysis; cuDNN repeats itself."""
    cudnn = torch.backends.cudnn
    for name, before in (("allow_tf32", not convolutions), ("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(cudnn, name, before)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", (asked := []).append)
    session.set_precision(torch.device("cuda"), tf32)
    assert asked == [products] and cudnn.allow_tf32 == convolutions
    session.set_precision(torch.device("cuda"))
    assert asked[1] == "highest" and not cudnn.allow_tf32 and cudnn.deterministic and not cudnn.benchmark
