"""A CUDA GPU computes what a CPU computes, in the memory that was promised (make gpu); skipped without one."""

import numpy as np
import pytest
import torch

import main_block
import resample
from benchmarks import analysis
from models import rainbow_layers
from rainbow import Alignment
from tests.golden_data import REPLAYS, golden
from tests.models.test_golden import IMPLEMENTATIONS, load, losses, to_double
from tests.rainbow.networks import batches, scatnet
from tests.training_runs import command, is_same, train
from tests.utils.figures.test_figures import every_figure, paper  # noqa: F401
from utils.figures.gallery import compute
from utils.figures.source import Source
from utils.runs import checkpoints
from utils.runs.session import set_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def folder_and_precision_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_precision(DEVICE)


@pytest.mark.parametrize("name, fast", IMPLEMENTATIONS)
def test_scores(name, fast):
    network, logits = load(name, fast=fast).to(DEVICE).eval(), golden(name)["logits"]
    with torch.no_grad():
        scores = network(golden(name)["input"].to(DEVICE)).cpu()
    assert (scores - logits).abs().max() < 1e-4 * logits.std()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", REPLAYS)
def test_training_losses(name, fast):
    exact = losses(to_double(load(name, "init_state_dict", fast=False)), name)
    assert losses(load(name, "init_state_dict", fast).to(DEVICE), name) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("network", ["norm", "complex", "parseval", "vgg"])
def test_a_run_has_the_history_of_the_cpus(network):
    here, there = (train(network, name, "--device", name, "--lr", "0.01")["history"] for name in ("cpu", "cuda"))
    for ours, theirs in zip(there, here, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-2)


def test_a_run_resumes_exactly():
    whole = train("norm", "whole", "--device", "cuda")
    train("norm", "half", "--device", "cuda", "--epochs", "1")
    assert is_same(train("norm", "half", "--device", "cuda"), whole)


@pytest.mark.parametrize("network", ["norm", "complex", "vgg"])
@pytest.mark.parametrize("more", [["--amp"], ["--tf32"], ["--compile"], ["--amp", "--compile"]], ids=" ".join)
def test_faster_arithmetic_learns(network, more):
    history = train(network, "run", "--device", "cuda", *more)["history"]
    assert history[-1]["train_loss"] < history[1]["train_loss"]


def test_samples_are_those_of_the_cpu():
    assert main_block.main(command("norm", "run", "--epochs", "3")) == 0
    networks = []
    for name in ("cpu", "cuda"):
        assert resample.main(f"--experiment run --dir {name} --device {name}".split()) == 0
        networks.append(checkpoints.load(f"checkpoints/{name}/checkpoint_repeat0.pt")["state_dict"])
    for name, theirs in networks[0].items():
        torch.testing.assert_close(networks[1][name], theirs, rtol=0, atol=1e-2 * theirs.abs().max().item())


def test_alignments_are_those_of_the_cpu():
    rainbow_layers.register()
    data, networks = batches(), [scatnet(seed=seed) for seed in (0, 1)]
    here = Alignment().fit(*networks, data)
    there = Alignment().fit(*(network.to(DEVICE) for network in networks), data)
    for ours, theirs in zip(there.matrices, here.matrices, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-3)


@every_figure
def test_figures_are_those_of_the_cpu(figure, paper, tmp_path):  # noqa: F811
    here, root = paper
    there = Source("paper", root.parent / "checkpoints", device=DEVICE, quiet=True)
    theirs, ours = compute(figure, here, "a test", root), compute(figure, there, "a test", tmp_path)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-2, atol=1e-2 * np.abs(theirs[name]).max())


@pytest.mark.parametrize("task, most", [("sampling", 8), ("moments of a pair", 8), ("covariance", 8)])
def test_the_analysis_holds_few_matrices_of_a_layers_size(task, most):
    """In multiples of D² numbers of double precision, at 410 channels."""
    rainbow_layers.register()
    run, dimension = analysis.memory_task(task, 410, DEVICE)
    with analysis.on_device(DEVICE) as peak:
        run()
    assert peak() <= most * 8 * dimension**2
