"""Our networks compute what the authors' program computes: filters, scores, losses while training, checkpoints."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.wavelets import filter_bank
from tests.golden_data import GOLDEN_NAMES, REPLAYS, golden, golden_args, golden_network
from utils.runs.checkpoints import load as load_checkpoint
from utils.runs.checkpoints import load_weights
from utils.runs.state import make_optimizer

IMPLEMENTATIONS = [(name, fast) for name in GOLDEN_NAMES for fast in ([None] if "resnet" in name else [True, False])]


def load(name, state="state_dict", fast=None):
    """The network of a golden file with one of its states, its blocks fused or not."""
    network = golden_network(name)
    load_weights(network, golden(name)[state], name)
    for block in network.blocks if fast is not None else ():
        block.fast = fast
    return network


def error(network, name):
    """The largest error of the logits, in standard deviations of the authors'."""
    logits = golden(name)["logits"]
    with torch.no_grad():
        return (network.eval()(golden(name)["input"]) - logits).abs().max() / logits.std()


@pytest.mark.parametrize("name", golden("filters"))
def test_filters(name):
    theirs = golden("filters")[name].numpy()
    size, angles, *rest = name.split("-")
    kind = {"none": "plain", "i0": 0, "i1": 1}[rest[-1]]
    padded = int(size[1:])
    ours = filter_bank(padded, padded, int(angles[1:]), kind, full_angles="full" in rest)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name, fast", IMPLEMENTATIONS)
def test_scores(name, fast):
    assert error(load(name, fast=fast), name) < 1e-4


def to_double(network):
    """The network in double precision, complex tensors too, which `Module.double` leaves as they are."""
    network.double()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128)
    return network


def losses(network, name):
    """The loss before each SGD step on the golden batches, in the network's precision."""
    weight = next(network.train().parameters())
    device, dtype = weight.device, weight.dtype
    optimizer = make_optimizer(network, golden_args(name))
    found = []
    for images, labels in golden(name)["train_batches"]:
        loss = F.cross_entropy(network(images.to(device, dtype.to_real())), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", REPLAYS)
def test_training_losses(name):
    """Within 1e-3. Eight images to a batch amplify rounding, theirs too: its effect, seen in double precision, adds."""
    published = golden(name)["train_losses"]
    exact = losses(to_double(load(name, "init_state_dict", fast=False)), name)
    assert exact == pytest.approx(published, rel=1e-3)
    for fast in (True, False):
        ours = losses(load(name, "init_state_dict", fast), name)
        assert ours == pytest.approx(exact, rel=1e-3)
        for loss, theirs, true in zip(ours, published, exact, strict=True):
            assert loss == pytest.approx(theirs, rel=1e-3 + abs(theirs / true - 1))


RESNET = "resnet18-w0.125-bnpost-nobias"
CHECKPOINTS = [("J8-norm-fact0-L4", ""), ("J8-complex-fact0-L4", ""), ("J4-norm-x-idproj", ""), (RESNET, "")]


@pytest.mark.parametrize("name, prefix", [*CHECKPOINTS, (RESNET, "module.")])
def test_checkpoints(name, prefix, tmp_path):
    """The file as the authors' program writes it; `module.` is the prefix of DataParallel."""
    state = {f"{prefix}{key}": value for key, value in golden(name)["state_dict"].items()}
    file = tmp_path / "best.pth.tar"
    torch.save({"state_dict": state, "epoch": 3, "arch": "?", "best_acc1": torch.tensor(1.0)}, file)
    network = golden_network(name)
    load_weights(network, load_checkpoint(file)["state_dict"], file)
    assert error(network, name) < 1e-4
