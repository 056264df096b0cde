"""The figures: drawn from numbers alone, computed from checkpoints of the paper's names; claims from kept numbers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models.signal import Signal
from tests.conftest import ROOT
from utils.errors import UserError
from utils.experiments import registry
from utils.figures.catalogue import FIGURES
from utils.figures.command import main
from utils.figures.curves import draw_curves
from utils.figures.data import FigureData, checkpoints_key, data_path, load_numbers, published_numbers, save_numbers
from utils.figures.gallery import claims_table, compute, save
from utils.figures.source import Source
from utils.runs import checkpoints, options
from utils.runs.folder import RunFolder
from utils.runs.networks import Trained, network_config

every_figure = pytest.mark.parametrize("figure", FIGURES.values(), ids=lambda figure: figure.name)


def kept(figure):
    """The laptop scale's numbers in the repository."""
    return load_numbers(data_path("laptop", figure.name, ROOT / "notebook_data"))


# drawing and files


@every_figure
@pytest.mark.parametrize("with_published", [False, True])
def test_every_figure_is_drawn_from_numbers_alone(figure, with_published, tmp_path):
    canvas = figure.draw(kept(figure), published_numbers(figure.name) if with_published else None)
    paths = save(canvas, tmp_path, "figure")
    assert [path.suffix for path in paths] == [".pdf", ".png"]
    pixels = np.asarray(Image.open(paths[1]).convert("L"))
    assert pixels.shape[1] > 600 and (pixels < 128).mean() > 0.005
    for axes in canvas.axes:
        assert axes.lines or axes.collections or axes.patches, f"panel {axes.get_label()} is empty"


def test_numbers_survive_the_file_and_damage_is_reported(tmp_path):
    path = data_path("laptop", "resampling_width", tmp_path)
    data = FigureData({"trained": np.array([95, 98.5])}, {"command": "c", "experiments": ["é"]})
    save_numbers(path, data)
    again = load_numbers(path)
    assert again.provenance == data.provenance
    np.testing.assert_array_equal(again["trained"], data["trained"])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not the numbers of a figure"):
        load_numbers(path)
    with pytest.raises(UserError, match="no such file"):
        load_numbers(tmp_path / "absent.npz")


def test_the_key_of_checkpoints_follows_their_contents(tmp_path):
    def key(value):
        torch.save({"state_dict": {"w": torch.full((3,), value)}}, tmp_path / "last.pt")
        return checkpoints_key([tmp_path / "last.pt"], "1")

    assert key(1.0) == key(1.0) != key(2.0)
    assert checkpoints_key([tmp_path / "last.pt"], "2") != key(2.0)
    assert checkpoints_key([tmp_path / "absent.pt"], "1")


# claims


@every_figure
def test_the_papers_claims_hold_in_the_kept_numbers(figure):
    numbers = kept(figure)
    assert {"command", "commit", "date", "checkpoints"} <= set(numbers.provenance)
    assert set(numbers.provenance["experiments"]) <= set(registry.by_name("laptop"))
    claims = figure.claims(numbers)
    for claim in claims:
        assert claim.figure == figure.number and claim.holds, f"{claim.text}: {claim.measured}"
    assert claims_table(claims).count("| yes |") == len(claims)


def swapped(one, other):
    return lambda data: (
        {name.replace(one, other): values for name, values in data.items() if one in name}
        | {name.replace(other, one): values for name, values in data.items() if other in name}
    )


def changed(change, *names):
    return lambda data: {name: change(values) for name, values in data.items() if name.startswith(names)}


# What makes all claims of a figure false, as new values of some of its numbers.
CONTRARY = {
    "gaussian_histograms": changed(np.zeros_like, "p_values"),
    "marchenko_pastur": swapped("coloured", "white"),
    "resampling_width": lambda data: {"rainbow": data["white"][::-1], "retrained": data["white"][::-1] / 2},
    "activation_spectra": changed(np.ones_like, "layer_"),
    "alignment_convergence": changed(np.fliplr, "scattering_errors", "resnet_errors"),
    "covariance_convergence": lambda data: {
        "errors": np.fliplr(data["errors"]),
        "clip_accuracies": data["clip_ranks"][None],
    },
    "imagenet_spectra": changed(np.ones_like, "scattering_activations", "resnet_activations"),
    "clipping": swapped("weight", "random"),
    "training_dynamics": changed(np.zeros_like, "amplification", "cosine"),
}


@every_figure
def test_contrary_numbers_refute_the_claims(figure):
    arrays = kept(figure)
    with np.errstate(divide="ignore"):
        claims = figure.claims(FigureData({**arrays, **CONTRARY[figure.name](arrays)}, {}))
    assert claims and not any(claim.holds for claim in claims), [claim.text for claim in claims if claim.holds]


@every_figure
def test_published_numbers_are_compared_with_ours(figure):
    published = published_numbers(figure.name)
    rows = figure.comparison(kept(figure))
    assert bool(rows) == (published is not None)
    for what, theirs, _ in rows:
        assert what and any(digit in theirs for digit in "0123456789")
    for claim in figure.claims(kept(figure)):
        known = claim.published not in ("plot only", "not in the paper")
        assert not known or published.provenance["source"].startswith(f"figure {figure.number}")


def test_published_claims_state_the_papers_numbers():
    stated = {claim.published for figure in FIGURES.values() for claim in figure.claims(kept(figure))}
    assert stated == {
        "plot only",
        "not in the paper",
        "8 of 9 above 1 %",
        "21.1, 12.1, 26.8 % coloured; 1.6, 3.9, 8.4 % whitened",
        "54.8 to 84.7 %, 33.2 to 7.2 points below trained networks",
        "67.2 to 88.7 %",
        "first layer about 0.35 to below 0.05, others 0.55-0.67 to 0.16-0.25",
        "79.8 of 80.9 % at 40 of 320 directions",
        "88.3, 87.8 and 58.1 % (j = 4)",
        "88.3 and 87.8 % (j = 4)",
    }


def test_rainbow_networks_come_near_the_trained_ones():
    numbers = kept(FIGURES[3])
    at = {width: place for place, width in enumerate(numbers["widths"])}
    gap = numbers["trained"] - numbers["rainbow"]
    assert gap[at[1]] <= 5 and gap[at[2]] <= 3
    assert (numbers["rainbow"] - numbers["white"])[at[0.5]] >= 10


# checkpoints of the paper's names, tiny and untrained


def tiny_arguments(experiment):
    """The command line of a tiny network in the place of an experiment's: few channels and few digits."""
    data = "--digits --data-subset 0:1".split()
    if "resnet18-custom" in experiment.arguments:
        width = {0.125: 1 / 64, 0.25: 1 / 32}.get(experiment.width, 1 / 16)
        arch = "--arch resnet18-custom --standard-no-bias --standard-batch-norm post --resize-images 32"
        return [*data, *arch.split(), "--standard-width-scaling", str(width)]
    blocks = 6 if experiment.group in ("gaussianity", "activation_convergence") else 4
    sizes = [str(min(max(2, int(4 * experiment.width)), 16))] * blocks
    arch = ["-a", "Fw Std Pr N", "--psi-arch", "mod", "--Pr-size", *sizes]
    if experiment.group == "imagenet_spectra":
        arch = ["-a", "Fw rho Std Pc", "--Pc-size", *sizes]
    return [*data, *arch, "--factorize-filters", "0", "--n-blocks", str(blocks), "--classifier-batch-norm", "std"]


def make_run(root, experiment, scale=1):
    """What a finished run of an experiment leaves, with a tiny untrained network, its weights times `scale`."""
    folder = RunFolder(root, experiment.name)
    folder.create()
    status = {"state": "finished", "epoch": experiment.epochs, "epochs": experiment.epochs, "acc1": 50.0}
    (folder.path / "status.json").write_text(json.dumps(status))
    (folder.path / "metrics.csv").write_text("epoch,val_acc5\n1,90\n")
    if 3 in experiment.figures:
        (folder.path / "args.json").write_text(json.dumps({"args": {}}))
        rows = "repeat,layer,acc1,acc5\n0,1,20,60\n0,2,40,70\n1,1,5,6\n1,2,50,80\n"
        (folder.path / "accuracies.csv").write_text(rows)
        torch.save({}, folder.path / experiment.output)
        return
    args = options.parse(tiny_arguments(experiment))
    size = args.resize_images or 8
    torch.manual_seed(experiment.seed)
    network = models.build(network_config(args, Signal(1, size, size), 10))
    torch._foreach_mul_([p.data for p in network.parameters()], scale)
    trained = Trained(network, args, Signal(1, size, size), 10)
    (folder.path / "args.json").write_text(json.dumps({"args": vars(args)}))
    for epoch in ("last", 0, 1) if experiment.group in ("dynamics", "weight_convergence") else ("last",):
        checkpoints.save(folder.file(epoch), checkpoints.checkpoint_of(network, args, trained, 1, 50.0))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    for experiment in registry.experiments("paper"):
        make_run(root / "checkpoints", experiment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "changes", lambda *command: {})  # the tiny networks stand for the paper's
        yield Source("paper", root / "checkpoints", device=torch.device("cpu"), quiet=True), root / "notebook_data"


def names_of(data):
    """Names of numbers without layers, widths and counts."""
    return {name for name in data if not name[-1].isdigit()}


@every_figure
def test_every_figure_computes_from_checkpoints_of_the_papers_names(figure, paper):
    source, root = paper
    data = compute(figure, source, "a test", root)
    assert data.provenance["command"] == "a test" and data.provenance["experiments"]
    for name, values in data.items():
        assert np.isfinite(values).all(), f"{name} is not finite"
    assert names_of(data) == names_of(kept(figure))
    figure.draw(data, published_numbers(figure.name))
    assert figure.claims(data) and bool(figure.comparison(data)) == (published_numbers(figure.name) is not None)
    path = data_path("paper", figure.name, root)
    written = path.stat().st_mtime_ns
    compute(figure, source, "again", root)
    assert path.stat().st_mtime_ns == written  # the same checkpoints: nothing to do


def test_sampled_accuracies_are_those_before_the_last_projection(paper):
    experiment = registry.figure_sets("paper", 3)["rainbow"][0]
    np.testing.assert_array_equal(paper[0].sampled_accuracies(experiment), [20, 5])


def test_every_network_sees_images_of_its_own_size(paper):
    members = registry.figure_sets("paper", 7)
    sizes = {name: next(iter(paper[0].train(member)))[0].shape[-1] for name, (member, *_) in members.items()}
    assert sizes == {"resnet": 32, "scattering": 8}


def error_of_figure_9(tmp_path, capsys):
    """What the command says on stderr if it can compute nothing."""
    folders = ["--checkpoints", str(tmp_path), "--numbers", str(tmp_path / "numbers"), "--out", str(tmp_path / "out")]
    assert main(["--scale", "laptop", "--figure", "9", "--device", "cpu", *folders]) == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "numbers").exists()
    return capsys.readouterr().err


def test_missing_experiments_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    error = error_of_figure_9(tmp_path, capsys)
    assert "3 of its 3 experiments are not finished" in error
    assert f"python run_exps.py --scale laptop --figure 9 --checkpoints {tmp_path}" in error
    assert registry.figure_sets("laptop", 9)["network"][0].name in error


def test_a_network_that_cannot_be_analysed_is_an_error_in_one_line(tmp_path, capsys):
    for experiment in registry.figure_sets("laptop", 9)["network"]:
        make_run(tmp_path, experiment, scale=float("nan"))
    error = error_of_figure_9(tmp_path, capsys)
    assert error.startswith("figures: error: ") and error.count("\n") == 1 and "not finite" in error


def test_training_curves_are_drawn_from_metrics_and_formats_are_kept(tmp_path, capsys):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    rows = ["epoch,train_loss,train_acc1,val_loss,val_acc1", "0,,,2.3,10.5", "1,1.5,60,1.2,70", "2,0.5,90,0.7,0"]
    (tmp_path / "runs" / "one" / "metrics.csv").write_text("\n".join(rows))
    loss, accuracy = draw_curves(tmp_path / "runs", ["one"]).axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [2.3, 1.2, 0.7])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [10.5, 70, 0])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [np.nan, 60, 90])
    flags = [
        "--checkpoints",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
        "--format",
        "svg",
        "--style",
        "poster",
    ]
    assert main(["--curves", "one", *flags]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.svg"]
    with pytest.raises(UserError, match="--curves two: no metrics.csv in .*known: one"):
        main(["--curves", "two", *flags])


def test_a_poster_has_the_paper_figures_layout_in_larger_letters():
    figure = FIGURES[3]
    paper, poster = (figure.draw(kept(figure), style=style) for style in ("paper", "poster"))
    np.testing.assert_allclose(poster.get_size_inches() / paper.get_size_inches(), 13 / 9)
    assert poster.axes[0].xaxis.label.get_size() > paper.axes[0].xaxis.label.get_size()
