"""What a run takes from a checkpoint: flags win over it or are refused, and it knows its data."""

import os
import signal
from pathlib import Path

import pytest
import torch

import main_block
from tests.training_runs import command, is_same, train
from utils.errors import StoppedError, UserError
from utils.runs.checkpoints import load, save
from utils.runs.folder import RunFolder
from utils.runs.training import Training

pytestmark = pytest.mark.usefixtures("folder_of_its_own")
ONE = ("--epochs", "1")
FROM = ("--resume", "checkpoints/a/last.pt", "--epochs", "2")


def stop_in_second_epoch(monkeypatch, name):
    """Trains for an epoch, then for three of the four steps of the next."""
    train("norm", name, *ONE)
    step = Training.train_step

    def stopping(self, *batch):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Training, "train_step", stopping)
        train("norm", name)


def log(name):
    return Path("checkpoints", name, "log.txt").read_text()


def test_flags_win_over_the_checkpoint_and_the_best_of_a_run_is_its_own():
    train("norm", "a", *ONE, "--wd", "0.01")
    checkpoint = load("checkpoints/a/last.pt")
    save("checkpoints/a/last.pt", {**checkpoint, "best_acc1": 99.0})
    last = train("norm", "b", *FROM, "--wd", "0", "--momentum", "0.5")
    assert [(group["weight_decay"], group["momentum"]) for group in last["optimizer"]["param_groups"]] == [(0, 0.5)]
    assert last["best_acc1"] == last["history"][-1]["val_acc1"] == load("checkpoints/b/best.pt")["best_acc1"]
    assert last["history"][:2] == checkpoint["history"]
    save("checkpoints/a/last.pt", checkpoint)
    assert is_same(train("norm", "c", *FROM, "--wd", "0.01"), train("norm", "a", "--epochs", "2", "--wd", "0.01"))


def without(*keys):
    return lambda checkpoint: [checkpoint.pop(key) for key in keys]


@pytest.mark.parametrize(
    "network, change, says",
    [
        ("frozen", None, "other weights were learned"),
        ("norm", without("epoch", "best_acc1", "optimizer", "args", "tally"), "it has no 'epoch'"),
        ("norm", without("optimizer"), "it has no 'optimizer'"),
        ("norm", lambda c: c.update(epoch="x"), "invalid literal"),
        ("norm", lambda c: c.update(learned=c["learned"][::-1]), "other weights were learned"),
        ("norm", lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(3)), "other weights"),
    ],
)
def test_what_does_not_fit_is_refused_and_named_and_its_weights_are_taken_by_restart(network, change, says):
    checkpoint = train("norm", "a", *ONE)
    if change:
        change(checkpoint)
    save("checkpoints/a/last.pt", checkpoint)
    with pytest.raises(UserError, match=f"a/last.pt: cannot be resumed: {says}.*; --restart takes only the weights"):
        train(network, "b", *FROM)
    assert os.listdir("checkpoints") == ["a"]
    assert train(network, "b", *FROM, "--restart")["epoch"] == 2


def test_a_refusal_leaves_the_run_that_it_would_overwrite():
    train("norm", "a", *ONE)
    before = {path: path.read_bytes() for path in Path("checkpoints/a").iterdir()}
    save("other.pt", {"state_dict": load("checkpoints/a/last.pt")["state_dict"]})
    with pytest.raises(UserError, match="no 'epoch'"):
        train("norm", "a", "--overwrite", "--resume", "other.pt")
    assert before == {path: path.read_bytes() for path in Path("checkpoints/a").iterdir()}


@pytest.mark.parametrize("change", ["train", "val", None])
def test_data_that_have_changed_within_an_epoch_begin_it_anew(monkeypatch, change):
    stop_in_second_epoch(monkeypatch, "a")
    checkpoint = load("checkpoints/a/last.pt")
    assert checkpoint["step"] == 3 and checkpoint["data"]["train"].startswith("200 images, ")
    if change:
        checkpoint["data"][change] = "7 images, of others"
        save("checkpoints/a/last.pt", checkpoint)
    train("norm", "a")
    said = f"the data have changed: {change} was 7 images, of others, is"
    assert (said in log("a")) is bool(change)
    assert ("epoch 2 begins anew: it had other batches, of which 3 were done" in log("a")) is (change == "train")
    assert ("resumed after epoch 1, step 3" in log("a")) is (change != "train")


def test_an_epoch_of_other_batches_begins_anew(monkeypatch):
    stop_in_second_epoch(monkeypatch, "a")
    for name, more in (("same", []), ("seed", ["--seed", "1"]), ("size", ["--batch-size", "32"])):
        train("norm", name, *FROM, *more)
        assert ("epoch 2 begins anew" in log(name)) is (name != "same")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", None])
def test_names_that_wrappers_put_before_weights_are_taken_off(prefix, capsys):
    state = train("norm", "a", *ONE)["state_dict"]
    file = {"state_dict": {prefix + name: value for name, value in state.items()}} if prefix else state
    torch.save(file, "wrapped.pt")
    capsys.readouterr()
    main_block.main(command("norm", "run", "--evaluate", "--resume", "wrapped.pt"))
    main_block.main(command("norm", "run", "--evaluate", "--resume", "a"))
    wrapped, plain = (line.partition(": ")[2] for line in capsys.readouterr().out.splitlines())
    assert wrapped == plain


def test_a_last_batch_of_one_image_is_left_out_if_batch_norm_needs_two():
    resnet = ["--arch", "resnet18-custom", "--standard-width-scaling", "0.1", *ONE]
    assert train("vgg", "a", *resnet, "--batch-size", "199")["history"][1]["train_loss"] > 0
    assert "1 images of each epoch are left out: batch norm needs two" in log("a")
    train("norm", "b", *ONE, "--batch-size", "199")
    assert "left out" not in log("b")
    with pytest.raises(UserError, match=r"200 images in batches of 1 \(--batch-size\): a batch needs at least two"):
        train("vgg", "c", *resnet, "--batch-size", "1")
    assert main_block.main(command("vgg", "a", *resnet, "--batch-size", "1", "--evaluate")) == 0


def test_a_folder_belongs_to_one_kind_of_work():
    folder = RunFolder("checkpoints", "samples")
    for file in ("accuracies.csv", "checkpoint_repeat0.pt", "args.json"):
        folder.path.mkdir(parents=True)
        folder.path.joinpath(file).write_text('{"args": {"experiment": "x"}}')
        for more in ([], ["--overwrite"]):
            with pytest.raises(UserError, match="samples holds the work of resample.py: give another --dir"):
                train("norm", "samples", *more)
        assert os.listdir(folder.path) == [file]
        folder.path.joinpath(file).unlink()
        folder.path.rmdir()
