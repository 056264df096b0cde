"""Standardisation and batch norm over several processes are those of all their batches together."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.signal import Signal
from models.standardization import SharedBatchNorm2d, Standardization
from tests.rounding import of_sum


@pytest.fixture
def two_ranks(monkeypatch):
    """`two_ranks(function)` gives [function(0), function(1)], run by two threads that are each other's ranks."""
    barrier, sent, rank = threading.Barrier(2, timeout=20), {}, threading.local()

    def all_reduce(tensor):
        sent[rank.number] = tensor.clone()
        barrier.wait()
        total = sent[0] + sent[1]
        barrier.wait()
        tensor.copy_(total)

    def run(number, function):
        rank.number = number
        return function(number)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        yield lambda function: list(pool.map(run, (0, 1), (function, function)))


def outputs_and_gradient(module, x, gradient, autocast=False):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.backward(gradient)
    return y.detach(), x.grad


MODULES = [
    ("batch norm", lambda: nn.BatchNorm2d(3), torch.float),
    ("no affine map", lambda: nn.BatchNorm2d(3, affine=False, momentum=0.3), torch.float),
    ("autocast", lambda: nn.BatchNorm2d(3), torch.bfloat16),
    ("Std", lambda: Standardization(Signal(3, 4, 4)), torch.float),
    ("complex Std", lambda: Standardization(Signal(3, 4, 4, True)), torch.cfloat),
    ("homogeneous", lambda: Standardization(Signal(3, 4, 4), homogeneous=True), torch.float),
    ("Std, autocast", lambda: Standardization(Signal(3, 4, 4)), torch.bfloat16),
]


@pytest.mark.parametrize("make, dtype", [m[1:] for m in MODULES], ids=[m[0] for m in MODULES])
def test_two_ranks_normalise_as_one_with_both_batches(make, dtype, two_ranks, monkeypatch):
    """Outputs, gradients and running statistics; bfloat16 inputs, those of autocast, have float32 statistics."""
    whole = make()
    shared = [copy.deepcopy(whole) for _ in range(2)]
    for module in shared:
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm2d
    working = torch.promote_types(dtype, torch.float)
    x = (torch.randn(5, 3, 4, 4, dtype=working) + 20).to(dtype)
    gradient = torch.randn(5, 3, 4, 4, dtype=working)
    low = dtype == torch.bfloat16
    parts = (slice(0, 2), slice(2, 5))
    ours = two_ranks(lambda r: outputs_and_gradient(shared[r], x[parts[r]], gradient[parts[r]], low))
    monkeypatch.undo()
    theirs = outputs_and_gradient(whole, x, gradient, low)
    for mine, other in zip((torch.cat(pair) for pair in zip(*ours)), theirs):
        assert mine.dtype == other.dtype
        unit = 2.0**-8 if low else 20 * of_sum(mine[:, 0].numel())  # the mean is 20 deviations
        assert (mine - other).abs().max() <= 2 * unit * other.abs().max()
    for module in shared:
        for mine, other in zip(module.state_dict().values(), whole.state_dict().values()):
            assert (mine - other).abs().max() <= 20 * of_sum(5 * 4 * 4) * other.abs().max()


def test_one_sample_per_channel_leaves_finite_statistics(two_ranks):
    module = SharedBatchNorm2d(3)
    two_ranks(lambda rank: module(torch.ones(1 - rank, 3, 1, 1)))
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
