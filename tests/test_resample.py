"""resample.py from the command line, on small networks trained on the digits: what it writes, when it refuses, and the
paper's claims about rainbow networks at laptop scale."""

import csv
import json
import os
import signal

import pytest
import torch

import main_block
import resample
from rainbow.alignment import Alignment
from rainbow.sampling import METHODS
from tests.soak.programs import Program, wait_for
from utils.data.datasets import load_datasets
from utils.errors import StoppedError, UserError
from utils.runs.checkpoints import load, save
from utils.runs.folder import RunFolder
from utils.runs.networks import load_network
from utils.runs.options import SAMPLING
from utils.runs.samples import read_rows

WIDTHS = (16, 32, 64, 64)
RECIPE = (
    "--digits --epochs 6 --learning-rate-adjust-frequency 2 --lr 0.05 --batch-size 32 --wd 0 --psi-arch mod "
    "--n-blocks 4 --factorize-filters 0 --scattering-wph 1 --scat-angles 4 4 4 4 --classifier-batch-norm std "
    "--no-classifier-bias --device cpu"
).split()


def train(root, name, widths, more=""):
    sizes = ["-a", "Fw Std Pr N", "--Pr-size", *map(str, widths)] if widths else []
    main_block.main([*RECIPE, *sizes, "--checkpoints", str(root), "--dir", name, *more.split()])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with networks of width scalings 1/2, 1 and 2, and one more of 2 from another initialisation."""
    root = tmp_path_factory.mktemp("checkpoints")
    for scale in (0.5, 1, 2):
        train(root, f"width{scale}", [int(scale * width) for width in WIDTHS])
    train(root, "other", [2 * width for width in WIDTHS], "--seed 1")
    return root


def arguments(root, experiment, *more):
    return ["--experiment", experiment, "--checkpoints", str(root), "--device", "cpu", *map(str, more)]


def run(root, experiment, *more):
    assert resample.main(arguments(root, experiment, *more)) == 0


def final(folder):
    """Mean top-1 accuracy of the samples whose last projection and classifier are the trained ones, rotated."""
    found = [float(row["acc1"]) for row in read_rows(folder) if row["layer"] == "3"]
    return sum(found) / len(found)


def contents(folder):
    """What samples are: their accuracies and weights."""
    states = {path.name: load(path)["state_dict"] for path in sorted(folder.glob("checkpoint_repeat*.pt"))}
    weights = [(name, key, value.tolist()) for name, state in states.items() for key, value in sorted(state.items())]
    return (folder / "accuracies.csv").read_bytes(), weights


@pytest.fixture(scope="module")
def sampled(root):
    for scale in (0.5, 1, 2):
        run(root, f"width{scale}", "--num-repeats", 3)
    return root / "resamplings"


def test_a_sample_is_written_with_the_accuracy_after_every_layer(root, sampled):
    folder = sampled / "resample-width1"
    found = read_rows(folder)
    assert [(row["repeat"], row["layer"]) for row in found] == [(str(r), str(j)) for r in range(3) for j in range(5)]
    assert all(0 <= float(row["acc1"]) <= float(row["acc5"]) <= 100 for row in found)
    trained = RunFolder(root, "width1").status()["acc1"]
    assert {row["acc1"] for row in found if row["layer"] == "0"} == {f"{trained:.4f}"}
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "finished" and status["acc1"] == pytest.approx(final(folder))
    assert not list(folder.glob(".*"))


def test_a_sample_can_be_trained_on_its_classifier_alone(root, sampled):
    sample = sampled / "resample-width0.5" / "checkpoint_repeat0.pt"
    resumed = "--resume resamplings/resample-width0.5/checkpoint_repeat0.pt --restart --freeze-P 1 1 1 1 --epochs 2"
    train(root, "retrained", [8, 16, 32, 32], resumed)
    before, after = load(sample)["state_dict"], RunFolder(root, "retrained").checkpoint()["state_dict"]
    weights = [name for name in before if name.endswith("Pr.weight")]
    assert len(weights) == 4 and all(torch.equal(before[name], after[name]) for name in weights)
    assert not torch.equal(before["classifier.linear.weight"], after["classifier.linear.weight"])
    with open(root / "retrained" / "metrics.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["val_acc1"]) == float(read_rows(sample.parent)[4]["acc1"])


def test_existing_samples_are_kept(root, sampled, capsys):
    folder = sampled / "resample-width1"
    before, times = contents(folder), [path.stat().st_mtime_ns for path in folder.glob("*.pt")]
    run(root, "width1", "--num-repeats", 3)
    assert capsys.readouterr().out.count("exists already") == 3
    with pytest.raises(UserError, match="holds samples with seed = 0, now 1"):
        run(root, "width1", "--seed", 1)
    assert contents(folder) == before and [path.stat().st_mtime_ns for path in folder.glob("*.pt")] == times
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def altered(root, tmp_path, status=None, args=None, weights=None):
    """A copy of a trained run with something else in it."""
    folder = RunFolder(tmp_path, "altered")
    folder.create()
    for name in ("args.json", "status.json", "last.pt"):
        (folder.path / name).write_bytes((root / "width0.5" / name).read_bytes())
    checkpoint = load(folder.file())
    if status:
        path = folder.path / "status.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **status}))
    if weights:
        weights(checkpoint["state_dict"])
    checkpoint["args"].update(args or {})
    save(folder.file(), checkpoint)


def test_samples_of_a_retrained_network_are_stale(root, tmp_path):
    found = []
    for factor in (1, 1.01):  # `N` undoes it: the accuracy is the same
        altered(root, tmp_path, weights=lambda w, factor=factor: w["blocks.3.body.Pr.weight"].mul_(factor))
        run(tmp_path, "altered")
        found.append(contents(tmp_path / "resamplings" / "resample-altered"))
    assert found[0] != found[1]


@pytest.mark.parametrize("moment", ["resample.save", "utils.runs.samples.write_rows"])
def test_an_interrupted_run_equals_an_uninterrupted_one(root, sampled, monkeypatch, moment):
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="stopped by SIGTERM"):
        patch.setattr(moment, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        run(root, "width1", "--num-repeats", 3, "--dir", moment)
    assert RunFolder(root, moment).status()["state"] == "stopped"
    run(root, "width1", "--num-repeats", 3, "--dir", moment)
    assert contents(root / moment) == contents(sampled / "resample-width1")


def test_a_damaged_sample_is_sampled_again(root, sampled):
    run(root, "width1", "--num-repeats", 3, "--dir", "damaged")
    os.truncate(root / "damaged" / "checkpoint_repeat1.pt", 500)
    run(root, "width1", "--num-repeats", 3, "--dir", "damaged")
    assert sorted(contents(root / "damaged")[1]) == sorted(contents(sampled / "resample-width1")[1])


def test_a_killed_process_leaves_what_the_next_one_finishes(root, sampled):
    argv = arguments(root, "width1", "--num-repeats", 3, "--dir", "killed")
    with Program(["resample.py", *argv]) as program:
        wait_for((root / "killed" / "checkpoint_repeat0.pt").exists)
        program.kill()
    assert json.loads((root / "killed" / "status.json").read_text())["state"] == "running"
    assert resample.main(argv) == 0
    known, found = (path / "accuracies.csv" for path in (sampled / "resample-width1", root / "killed"))
    assert found.read_bytes() == known.read_bytes()


@pytest.mark.parametrize("kind", ["Pr", "Pc"])
def test_complex_networks_are_sampled_at_other_widths(tmp_path, kind):
    blocks = "--n-blocks 2 --scat-angles 4 4".split()
    more = ["-a", f"Fw rho Std {kind} N", "--psi-arch", "", *blocks, f"--{kind}-size", "4", "6"]
    main_block.main([*RECIPE, *more, "--epochs", "0", "--checkpoints", str(tmp_path), "--dir", "trained"])
    run(tmp_path, "trained", "--num-atoms", 8, 5, "--dir", "wide", "--method", "orthogonal", "--align-test")
    network, args, *_ = load_network(tmp_path / "wide" / "checkpoint_repeat0.pt")
    assert getattr(args, f"{kind}_size") == [8, 5] == [len(p.weight) for p in network.projections()]


def test_resnets_are_sampled_at_widths_of_one_scaling(tmp_path):
    network = "--digits --resize-images 32 -a resnet18-custom --standard-width-scaling 0.0625 --epochs 0 --device cpu"
    main_block.main([*network.split(), "--checkpoints", str(tmp_path), "--dir", "trained"])
    names = [4] * 5 + [8] * 5 + [16] * 5 + [32] * 5
    run(tmp_path, "trained", "--num-atoms", *[2 * n for n in names], "--dir", "wide", "--epoch", 0)
    network, args, *_ = load_network(tmp_path / "wide" / "checkpoint_repeat0.pt")
    assert args.standard_width_scaling == 0.125 and len(network.conv1.weight) == 8
    with pytest.raises(UserError, match="one s; s = 0.125 gives 8 8 8 8 8 16"):
        run(tmp_path, "trained", "--num-atoms", *[8] * 20, "--dir", "odd")


@pytest.mark.parametrize(
    "more, message",
    [
        ("--experiment widht1", "no such run in .*; did you mean width1"),
        ("--experiment width1 --epoch 3", "epochs kept in .*: 0, 1, 2, 5"),
        ("--experiment width1 --num-atoms 8 16", "2 widths are given for 4 layers"),
        ("--experiment width1 --num-atoms 8 0", "'?0'? is not a positive integer"),
        ("--experiment width1 --method uniform", "invalid choice"),
        ("--experiment ../width1", "not a name of a run"),
        ("--experiment width1 --dir /tmp", "not a name of a run"),
        ("--experiment width1 --device tpu", "no such device"),
        ("--experiment width1 --batch-size 0", "is not a positive integer"),
        ("--epoch 1", "--experiment"),
    ],
)
def test_refusals_leave_nothing(root, more, message):
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=message):
        resample.main([*more.split(), "--checkpoints", str(root)])
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"status": {"state": "stopped", "epoch": 4}}, r"not finished \(epoch 4 of 6, stopped\)"),
        ({"status": {"acc1": "90"}}, "status.json: acc1 is '90', not a number"),
        ({"status": {"acc1": 40.0}}, "accuracy differs from training time .40.00 %, now"),
        ({"args": {"resize_images": 16}}, "was trained on 1 real channels of 8×8 and 10"),
        (
            {"weights": lambda w: w["blocks.1.body.Pr.weight"].view(-1)[:3].fill_(float("nan"))},
            "layer blocks.1.body.Pr: 3 of its 640 weights are not finite",
        ),
    ],
)
def test_networks_that_cannot_be_sampled(root, tmp_path, change, message):
    altered(root, tmp_path, **change)
    with pytest.raises(UserError, match=message):
        run(tmp_path, "altered")
    assert [path.name for path in tmp_path.iterdir()] == ["altered"]


def test_no_older_epoch_is_sampled_for_a_damaged_last_one(root, tmp_path):
    altered(root, tmp_path)
    folder = RunFolder(tmp_path, "altered")
    folder.save_last(folder.checkpoint())
    os.truncate(folder.file("last"), 500)
    with pytest.raises(UserError, match=r"last.pt: damaged.*; the command that trained it mends it"):
        run(tmp_path, "altered")


def test_samples_and_runs_have_folders_of_their_own(root, sampled):
    before = contents(sampled / "resample-width1"), (root / "width1" / "status.json").read_bytes()
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="width1 holds the work of main_block.py: give another --dir"):
            run(root, "width0.5", "--dir", "width1", *more)
    with pytest.raises(UserError, match="resample-width1 holds the work of resample.py"):
        train(root, "resamplings/resample-width1", WIDTHS)
    assert before == (contents(sampled / "resample-width1"), (root / "width1" / "status.json").read_bytes())


def test_the_methods_are_those_of_the_library():
    assert SAMPLING.by_field["method"].choices == METHODS


# The paper's claims, on the digits


def test_rainbow_accuracy_rises_with_width_towards_the_trained_networks(root, sampled):
    rainbow = {scale: final(sampled / f"resample-width{scale}") for scale in (0.5, 1, 2)}
    trained = {scale: RunFolder(root, f"width{scale}").status()["acc1"] for scale in (1, 2)}
    assert rainbow[0.5] < rainbow[1] < rainbow[2]
    assert rainbow[1] > trained[1] - 5 and rainbow[2] > trained[2] - 3


def test_white_features_stay_below_and_twice_the_width_is_as_good(root, sampled):
    for name, more in (("white", ["--method", "white"]), ("wide", ["--num-atoms", *WIDTHS])):
        run(root, "width0.5", *more, "--dir", name, "--num-repeats", 3)
    assert final(root / "white") < final(sampled / "resample-width0.5") - 10
    assert final(root / "wide") >= final(sampled / "resample-width0.5")


def test_alignment_errors_fall_with_width(root):
    networks = [load_network(RunFolder(root, f"width{scale}")).network for scale in (0.5, 1, 2)]
    other, args, *_ = load_network(RunFolder(root, "other"))
    data = load_datasets(args)
    train_set, test_set = (images.loader(250) for images in (data.train, data.val))
    errors = [Alignment().fit(network, other, train_set).score(network, other, test_set) for network in networks]
    for layer in zip(*errors):
        assert layer[0] > layer[1] > layer[2] or max(layer) < 1e-3  # the first layer's input is the same
