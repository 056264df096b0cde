"""The figures: drawn from numbers alone, computed from checkpoints of the paper's names; claims from saved numbers."""

import json

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import models
from models.signal import Signal
from tests.conftest import ROOT
from utils.errors import UserError
from utils.experiments import registry as experiments
from utils.figures import command as figures
from utils.figures.claims import claims_of, comparison
from utils.figures.command import FIGURES
from utils.figures.data import FigureData, checkpoints_key, data_path, load_numbers, load_published, save_numbers
from utils.figures.drawing import shades, width_label
from utils.figures.source import Source
from utils.runs import checkpoints, options

KEPT = ROOT / "notebook_data"


def decay(count, rate=1.5):
    return np.arange(1, count + 1.0) ** -rate


def synthetic(number):
    """Numbers as the functions of `figure_numbers` give them, made up."""
    rng = np.random.default_rng(number)
    layers, widths = np.array([2, 3, 4]), np.array([0.25, 0.5, 1.0, 2.0])
    if number == 1:
        edges = np.linspace(-4, 4, 33)
        density = np.stack([[np.histogram(rng.standard_normal(600), edges, density=True)[0] for _ in range(3)]] * 3)
        return {
            "edges": edges,
            "density": density,
            "p_values": rng.random((3, 3)),
            "ranks": np.array([1, 10, 50]),
            "layers": layers,
            "samples": np.array([600] * 3),
        }
    if number == 2:
        white = np.linalg.svd(rng.standard_normal((60, 150)), compute_uv=False) ** 2 / 60
        spiked = np.concatenate([[40, 25, 12.0], white[3:] * 0.5])
        numbers = {f"{name}_{j}": values for j in layers for name, values in (("coloured", spiked), ("white", white))}
        shares = {"outside_coloured": [0.3] * 3, "outside_white": [0.02] * 3, "above_coloured": [0.1] * 3}
        return {**numbers, **{k: np.array(v) for k, v in shares.items()}, "layers": layers, "q": np.array([2.5] * 3)}
    if number == 3:
        return {
            "widths": widths,
            "trained": np.array([95, 97, 98, 98.5]),
            "retrained": np.array([80, 90, 95, 97.0]),
            "white": np.array([50, 60, 75, 85.0]),
            "rainbow": np.array([70, 80, 91, 95.0]),
            "rainbow_std": np.array([3, 2, 1, 0.5]),
        }
    if number == 4:
        return {
            "layer": np.array(4),
            "widths": widths,
            "layers": layers,
            **{f"width_{w:g}": decay(int(40 * w)) for w in widths},
            **{f"layer_{j}": decay(20 * j, j) for j in layers},
        }
    if number == 5:
        errors = np.outer([1, 2, 3], 0.2 * widths[:3] ** -0.5)
        return {
            f"{n}_{k}": v
            for n in ("scattering", "resnet")
            for k, v in (("widths", widths[:3]), ("layers", layers), ("errors", errors))
        }
    if number == 6:
        spectrum = 5 * np.exp(-np.arange(1, 81) / 7) + 0.01
        spectra = {
            f"{kind}_{n}": spectrum[: 30 * n] * scale
            for n in (1, 5, 20)
            for kind, scale in (("eigenvalues", 1.0), ("initial", 0.2))
        }
        clipped = 98 - 88 * np.exp(-np.arange(0, 81, 8) / 5)
        return {
            "layer": np.array(2),
            "fit_ranks": np.array(20),
            "counts": np.array([1, 5, 20]),
            **spectra,
            "fit_networks": np.array([5, 1 / 7]),
            "fit_widths": np.array([5, 1 / 7]),
            "widths": widths,
            **{f"eigenvalues_width_{w:g}": spectrum[: int(40 * w)] for w in widths},
            "clip_ranks": np.arange(0, 81, 8),
            "clip_accuracies": np.stack([clipped] * 3),
            "error_layers": np.array([2, 3]),
            "errors": np.array([[0.8, 0.5, 0.3], [0.9, 0.7, 0.5]]),
        }
    if number == 7:
        return {
            k: v
            for name, count in (("scattering", 6), ("resnet", 17))
            for k, v in (
                (f"{name}_layers", np.arange(1, count + 1)),
                (f"{name}_acc5", np.array(99.0)),
                *(
                    (f"{name}_{kind}_{j}", decay(30 + 10 * j))
                    for j in range(1, count + 1)
                    for kind in ("activations", "weights")
                ),
            )
        }
    if number == 8:
        ranks = np.arange(0, 51)
        rises = {"weight": 2, "kernel": 3, "random": 20}
        return {
            "layers": layers,
            **{f"ranks_{j}": ranks * j for j in layers},
            **{
                f"{kind}_{b}_{j}": top * (1 - np.exp(-ranks / tau))
                for j in layers
                for b, tau in rises.items()
                for kind, top in (("accuracy", 98), ("explained", 1))
            },
        }
    ranks = np.arange(1, 65)
    times = np.array([0, 1, 2, 5, 10])[:, None]
    return {
        "layer": np.array(4),
        "epochs": times[:, 0],
        "amplification": 1 + times * ranks**-0.8,
        "cosine": 1 - times / 20 * ranks**-0.1,
        "planes": np.array([(1, 2), (1, 12), (12, 13)]),
        "trajectories": rng.standard_normal((3, 64, 1, 2)) * np.linspace(1, 3, 5)[:, None],
    }


@pytest.mark.parametrize("number", FIGURES)
def test_every_figure_is_drawn_from_numbers_alone(number, tmp_path):
    numbers = FigureData(synthetic(number), {})
    canvas = figures.draw(FIGURES[number], numbers, load_published().get(FIGURES[number].name))
    paths = figures.save(canvas, tmp_path, "figure")
    assert [path.suffix for path in paths] == [".pdf", ".png"]
    pixels = np.asarray(Image.open(paths[1]).convert("L"))
    assert pixels.shape[1] > 600 and (pixels < 128).mean() > 0.005
    for axes in canvas.axes:
        assert axes.lines or axes.collections or axes.patches, f"panel {axes.get_label()} is empty"


def test_numbers_are_kept_whole_and_damage_is_said(tmp_path):
    path = data_path("laptop", "resampling_width", tmp_path)
    data = FigureData(synthetic(3), {"command": "c", "commit": "abc", "date": "d", "experiments": ["e"]})
    save_numbers(path, data)
    again = load_numbers(path)
    assert again.provenance == data.provenance
    np.testing.assert_array_equal(again["trained"], data["trained"])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="not numbers of a figure"):
        load_numbers(path)
    with pytest.raises(UserError, match="no such numbers"):
        load_numbers(tmp_path / "absent.npz")


def test_the_key_of_checkpoints_follows_their_contents(tmp_path):
    def key(value):
        torch.save({"state_dict": {"w": torch.full((3,), value)}}, tmp_path / "last.pt")
        return checkpoints_key([tmp_path / "last.pt"], "1")

    assert key(1.0) == key(1.0) != key(2.0)
    assert checkpoints_key([tmp_path / "last.pt"], "2") != key(2.0)
    assert checkpoints_key([tmp_path / "absent.pt"], "1")


def test_claims_and_comparisons_read_the_same_numbers():
    published = load_published()
    for number, figure in FIGURES.items():
        numbers = FigureData(synthetic(number), {})
        claims = claims_of(number, numbers)
        assert claims and all(claim.figure == number and claim.measured for claim in claims)
        rows = comparison(number, numbers, published.get(figure.name, {}))
        assert bool(rows) == (figure.name in published)
    assert figures.claims_table(claims).count("\n") == len(claims) + 1


def test_small_helpers():
    assert width_label(0.125) == "$2^{-3}$" and width_label(3) == "3"
    assert len(shades("plasma", 1)) == 1 and len(shades("cool", 3)) == 3


# --- The numbers that are kept, of the laptop scale ------------------------------------------------------------------


@pytest.mark.parametrize("number", FIGURES)
def test_the_papers_claims_hold_in_the_kept_numbers(number):
    numbers = load_numbers(data_path("laptop", FIGURES[number].name, KEPT))
    assert {"command", "commit", "date", "experiments", "checkpoints"} <= set(numbers.provenance)
    known = set(experiments.by_name("laptop"))
    assert set(numbers.provenance["experiments"]) <= known
    for claim in claims_of(number, numbers):
        assert claim.holds or claim.note, f"{claim.text}: {claim.measured}"


def test_rainbow_networks_come_near_the_trained_ones():
    numbers = load_numbers(data_path("laptop", "resampling_width", KEPT))
    at = {width: place for place, width in enumerate(numbers["widths"])}
    gap = numbers["trained"] - numbers["rainbow"]
    assert gap[at[1]] <= 5 and gap[at[2]] <= 3
    assert (numbers["rainbow"] - numbers["white"])[at[0.5]] >= 10


def test_the_notebook_runs_from_the_kept_numbers():
    notebook = nbformat.read(ROOT / "paper_figs.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        if "gallery.show(" in cell.source:
            kinds = [kind for output in outputs for kind in output.get("data", {})]
            assert "image/png" in kinds, f"{cell.source} draws nothing"


def test_the_committed_notebook_is_executed_at_laptop_scale():
    notebook = nbformat.read(ROOT / "paper_figs.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells]
    assert sum(source.startswith("gallery.show(") for source in sources) == len(FIGURES)
    assert any('SCALE = "laptop"' in source and "RECOMPUTE = False" in source for source in sources)
    assert all(cell.outputs for cell in notebook.cells if cell.source.startswith("gallery.show"))


# --- Checkpoints of the paper's names, tiny and untrained ---------------------------------------------------------


def tiny_arguments(experiment):
    """The command line of a tiny network in the place of an experiment's: few channels and few digits."""
    data = ["--digits", "--data-subset", "0:1"]
    if "resnet18-custom" in experiment.arguments:
        width = {0.125: 1 / 64, 0.25: 1 / 32}.get(experiment.width, 1 / 16)
        return [
            *data,
            "--resize-images",
            "32",
            "--arch",
            "resnet18-custom",
            "--standard-no-bias",
            "--standard-batch-norm",
            "post",
            "--standard-width-scaling",
            str(width),
        ]
    blocks = 6 if experiment.group in ("gaussianity", "activation_convergence") else 4
    sizes = [str(min(max(2, int(4 * experiment.width)), 16))] * blocks
    arch = ["-a", "Fw Std Pr N", "--psi-arch", "mod", "--Pr-size", *sizes]
    if experiment.group == "imagenet_spectra":
        arch = ["-a", "Fw rho Std Pc", "--Pc-size", *sizes]
    return [*data, *arch, "--factorize-filters", "0", "--n-blocks", str(blocks), "--classifier-batch-norm", "std"]


def make_run(root, experiment):
    """What a finished run of an experiment leaves, with a tiny network that was never trained."""
    folder = checkpoints.RunFolder(root, experiment.name)
    folder.create()
    (folder.path / "status.json").write_text(json.dumps({"state": "finished", "epoch": 1, "acc1": 50.0}))
    (folder.path / "metrics.csv").write_text("epoch,val_acc5\n1,90\n")
    if 3 in experiment.figures:
        (folder.path / "args.json").write_text(json.dumps({"args": {}}))
        rows = "repeat,layer,acc1,acc5\n0,1,20,60\n0,2,40,70\n1,1,5,6\n1,2,50,80\n"
        (folder.path / "accuracies.csv").write_text(rows)
        torch.save({}, folder.path / experiment.output)
        return
    args = options.parse(tiny_arguments(experiment))
    size = args.resize_images or 8
    args.input_shape, args.num_classes = [1, size, size], 10
    torch.manual_seed(experiment.seed)
    network = models.build(options.network_config(args, Signal(1, size, size), 10))
    (folder.path / "args.json").write_text(json.dumps({"args": vars(args)}))
    for epoch in ("last", 0, 1) if experiment.group in ("dynamics", "weight_convergence") else ("last",):
        checkpoints.save(folder.file(epoch), checkpoints.checkpoint_of(network, args, 1, 50.0))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    for experiment in experiments.experiments("paper"):
        make_run(root / "checkpoints", experiment)
    return Source("paper", root / "checkpoints", torch.device("cpu"), quiet=True), root / "notebook_data"


@pytest.mark.parametrize("number", FIGURES)
def test_every_figure_computes_from_checkpoints_of_the_papers_names(number, paper):
    figure, (source, kept) = FIGURES[number], paper
    data = figures.compute(figure, source, "a test", kept)
    assert data.provenance["command"] == "a test" and data.provenance["experiments"]
    for name, values in data.arrays.items():
        assert np.isfinite(values).all(), f"{name} is not finite"
    assert set(synthetic(number)) - set(data.arrays) <= {name for name in synthetic(number) if name[-1].isdigit()}
    figures.draw(figure, data)
    assert claims_of(number, data)
    path = data_path("paper", figure.name, kept)
    written = path.stat().st_mtime_ns
    figures.compute(figure, source, "again", kept)
    assert path.stat().st_mtime_ns == written  # the same checkpoints: nothing to do


def test_missing_experiments_are_named_with_the_command_that_makes_them(tmp_path, capsys):
    status = figures.main(
        [
            "--scale",
            "laptop",
            "--figure",
            "9",
            "--checkpoints",
            str(tmp_path),
            "--device",
            "cpu",
            "--numbers",
            str(tmp_path / "numbers"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    error = capsys.readouterr().err
    assert status == 2 and not (tmp_path / "out").exists() and not (tmp_path / "numbers").exists()
    assert "1 of its 1 experiments are not finished" in error
    assert f"python run_exps.py --scale laptop --figure 9 --checkpoints {tmp_path}" in error
    assert experiments.figure_sets("laptop", 9)["network"][0].name in error
