"""Our networks compute what the authors' program computes: filters, scores, losses while training."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import build
from models.signal import Signal
from models.wavelets import filter_bank
from tests.conftest import GOLDEN
from utils.runs.checkpoints import convert_original
from utils.runs.options import network_config, parse

NAMES = sorted(path.stem for path in GOLDEN.glob("J*.pt"))
needs_golden = pytest.mark.skipif(not NAMES, reason=f"outputs of the original program are not at {GOLDEN}")
TRACE = [
    "J4-norm-fact0-L4",
    "J4-skip-fact0-L4",
    "J4-complex-fact0-L4",
    "J8-norm-fact0-L4",
    "J8-skip-fact0-L4",
    "J8-complex-fact0-L4",
]


def load(golden, name, state="state_dict"):
    """The network of a golden file with one of its states, and the file."""
    data = golden(name)
    argv = data["argv"] if isinstance(data["argv"], str) else None
    args = parse(argv.split() if argv else list(data["argv"]))
    network = build(network_config(args, Signal(data["input"].shape[1], 32, 32), 10))
    network.load_state_dict(convert_original(data[state], network))
    return network, data


@needs_golden
def test_filters(golden):
    for name, theirs in golden("filters").items():
        size, angles, *rest = name.split("-")
        kind = {"none": "plain", "i0": 0, "i1": 1}[rest[-1]]
        padded = int(size[1:])
        ours = filter_bank(padded, padded, int(angles[1:]), kind, full_angles="full" in rest)
        assert np.abs(ours - theirs.numpy()).max() < 1e-5 * theirs.abs().max(), name


@needs_golden
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_scores(golden, name, fast):
    network, data = load(golden, name)
    for block in network.eval().blocks:
        block.fast = fast
    with torch.no_grad():
        error = (network(data["input"]) - data["logits"]).abs().max()
    assert error < 1e-4 * data["logits"].std()


def to_double(network):
    """The network in double precision, complex tensors too, which `Module.double` leaves as they are."""
    network.double()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128)
    return network


def losses(network, data, fast=False):
    """The loss before each SGD step on the golden batches, in the network's precision."""
    for block in network.train().blocks:
        block.fast = fast
    dtype = next(network.parameters()).dtype
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    found = []
    for images, labels in data["train_batches"]:
        loss = F.cross_entropy(network(images.to(dtype.to_real())), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@needs_golden
@pytest.mark.parametrize("name", TRACE)
def test_training_losses(golden, name):
    """Within 1e-3. Eight images to a batch amplify rounding, theirs too: its effect, seen in double precision, adds."""
    exact = losses(to_double(load(golden, name, "init_state_dict")[0]), golden(name))
    assert exact == pytest.approx(golden(name)["train_losses"], rel=1e-3)
    for fast in (True, False):
        ours = losses(*load(golden, name, "init_state_dict"), fast)
        assert ours == pytest.approx(exact, rel=1e-3)
        for loss, theirs, true in zip(ours, golden(name)["train_losses"], exact, strict=True):
            assert loss == pytest.approx(theirs, rel=1e-3 + abs(theirs / true - 1))
