"""Run folders: nothing damaged, foreign or hostile is taken for a checkpoint, and nothing is lost by a failed write."""

import os
import pickle
import random
import resource
from dataclasses import replace

import pytest
import torch

import models
from models.signal import Signal
from utils.errors import UserError, WriteError
from utils.runs import checkpoints, options
from utils.runs.checkpoints import load, load_weights, save
from utils.runs.folder import RunFolder
from utils.runs.networks import Trained, load_network, network_config

ARGV = "--digits --dir run --n-blocks 2 --scat-angles 4 4 --psi-arch mod --Pr-size 4 -a".split() + ["Fw Std Pr N"]
DATA = Trained(None, None, Signal(1, 8, 8), 10)


@pytest.fixture
def args():
    return options.parse(ARGV, {})


@pytest.fixture
def network(args):
    torch.manual_seed(0)
    return models.build(network_config(args, Signal(1, 8, 8), 10))


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path, "group/run")
    folder.create()
    return folder


def checkpoint(value, epoch=1):
    return {"state_dict": {"w": torch.full((50,), float(value))}, "epoch": epoch, "notes": [1, "two", None]}


def value_of(loaded):
    return loaded["state_dict"]["w"][0].item()


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "file.pt", checkpoint(3))
    loaded = load(tmp_path / "file.pt")
    assert value_of(loaded) == 3 and loaded["notes"] == [1, "two", None]
    assert os.listdir(tmp_path) == ["file.pt"]


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    save(tmp_path / "good.pt", checkpoint(3))
    content = (tmp_path / "good.pt").read_bytes()
    refused = 0
    for position in random.Random(0).sample(range(len(content)), 400):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "bad.pt").write_bytes(flipped)
        try:
            loaded = load(tmp_path / "bad.pt")
        except UserError:
            refused += 1
        else:  # a bit that means nothing, such as padding
            assert torch.equal(loaded["state_dict"]["w"], torch.full((50,), 3.0)) and loaded["epoch"] == 1
    assert refused > 100


CUTS = [lambda path, n=n: path.write_bytes(path.read_bytes()[:n]) for n in (0, 1, 100, 1000, -1)]
OTHERS = [(lambda path: torch.save([1, 2], path), "no state_dict"), (os.remove, "no such checkpoint")]


@pytest.mark.parametrize("write, says", [*((cut, "damaged or not a checkpoint|refused") for cut in CUTS), *OTHERS])
def test_what_is_no_whole_checkpoint_is_refused(tmp_path, write, says):
    save(tmp_path / "file.pt", checkpoint(3))
    write(tmp_path / "file.pt")
    with pytest.raises(UserError, match=rf"file\.pt: .*({says})"):
        load(tmp_path / "file.pt")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_file_is_never_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"state_dict": {"w": Hostile()}}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="refused"):
        load(tmp_path / "file.pt")
    assert os.listdir(tmp_path) == ["file.pt"]


def test_a_full_disk_leaves_everything_as_it_was(folder):
    folder.save_last(checkpoint(1))
    folder.save_last(checkpoint(2))
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"last\.pt"):
            folder.save_last(checkpoint(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before
    folder.save_last(checkpoint(4))
    assert value_of(folder.checkpoint()) == 4 and value_of(folder.checkpoint("previous")) == 2


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK"), lambda path: os.truncate(path, 700)]
)
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(folder, capsys, damage):
    folder.save_last(checkpoint(1))
    folder.save_last(checkpoint(2))
    damage(folder.file("last"))
    assert value_of(folder.checkpoint()) == 1
    assert "WARNING" in capsys.readouterr().err
    folder.checkpoint(repair=True)
    assert value_of(load(folder.file("last"))) == 1 and not folder.file("previous").exists()
    save(folder.file("previous"), checkpoint(0))
    for epoch in ("last", "previous"):  # both are damaged: nothing is removed
        folder.file(epoch).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"previous\.pt"):
        folder.checkpoint(repair=True)
    assert folder.file("last").exists() and folder.file("previous").exists()


def test_left_overs_of_killed_processes_are_removed(folder):
    (folder.path / ".last.pt.123.tmp").touch()
    folder.save_last(checkpoint(1))
    folder.clean()
    assert [file.name for file in folder.path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "a/..", "..\\x", "", "a\nb", "C:x"])
def test_names_cannot_leave_the_folder_of_checkpoints(tmp_path, name):
    with pytest.raises(UserError):
        RunFolder(tmp_path, name)


def test_epochs_are_listed_and_missing_ones_named(folder):
    for epoch in (0, 10, 2):
        save(folder.file(epoch), checkpoint(epoch))
    assert folder.epochs() == [0, 2, 10]
    assert value_of(folder.checkpoint(10)) == 10
    with pytest.raises(UserError, match="0, 2, 10"):
        folder.checkpoint(5)


def test_epochs_kept_are_those_of_the_original():
    kept = [epoch for epoch in range(501) if checkpoints.is_saved_epoch(epoch)]
    assert kept == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500]


def test_a_network_is_loaded_without_data_or_the_files_it_started_from(tmp_path, folder, args, network):
    torch.save(torch.eye(5)[:3], tmp_path / "vectors.pt")
    args = replace(args, P_eigenvectors=[str(tmp_path / "vectors.pt"), None])
    network = models.build(network_config(args, Signal(1, 8, 8), 10)).eval()
    save(folder.file(3), checkpoints.checkpoint_of(network, args, DATA, 3, 50.0))
    (tmp_path / "vectors.pt").unlink()
    loaded, loaded_args, *_ = load_network(folder, 3)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), network(x)) and loaded_args.Pr_size == [4, 4]


def test_weights_of_another_network_are_refused(network):
    state, first = network.state_dict(), "blocks.0.body.Pr.weight"
    before = state[first].clone()
    for found, says in (
        ({**state, first: torch.zeros(4, 6)}, f"{first} is 4×6, expected 4×5"),
        ({**state, first: before + 0j}, f"{first} is 4×5 complex, expected 4×5"),
        ({key: value for key, value in state.items() if key != first}, f"missing key '{first}'"),
        ({**state, "other": torch.zeros(1)}, "unexpected key 'other'"),
    ):
        with pytest.raises(UserError, match=says):
            load_weights(network, found, "file.pt")
        assert torch.equal(network.state_dict()[first], before)
        found = {**found, "classifier.linear.bias": torch.ones(10)}
        (left_out,) = load_weights(network, found, "file.pt", loose=True)
        assert says in left_out and torch.equal(network.state_dict()[first], before)
        assert torch.equal(network.classifier.linear.bias, torch.ones(10))
    with pytest.raises(UserError, match="file.pt: weights of another network"):
        load_weights(network, {"other": torch.zeros(1)}, "file.pt", loose=True)


@pytest.mark.parametrize("change", [{"arch": None}, {"Pr_size": 3}, {"input_shape": "x"}, {"n_blocks": "2"}])
def test_arguments_that_describe_no_network_are_an_error(folder, args, network, change):
    values = checkpoints.checkpoint_of(network, args, DATA, 0, 0.0)
    values["args"].update(change)
    save(folder.file(0), values)
    with pytest.raises(UserError, match=r"epoch_0\.pt"):
        load_network(folder, 0)
