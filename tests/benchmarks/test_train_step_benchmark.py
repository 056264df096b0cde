"""The benchmark of the training step times what it says."""

import math

import pytest

from benchmarks.train_step import NETWORKS, prepare, products
from models import build


@pytest.mark.parametrize("name, factor", [("norm8", 1), ("norm4", 1), ("laptop", 1), ("skip8", 1.5), ("imagenet", 3)])
def test_the_floor_is_the_projections_products(name, factor):
    """Multiply-adds: C·D a position; 1.5 times as many for real weights on [z, |z|], 3 times for complex ones."""
    config, batch = NETWORKS[name]
    net = build(config)
    expected = sum(factor * block.P.weight.numel() * batch * block.out.height * block.out.width for block in net.blocks)
    assert sum(math.prod(shape) for shape in products(net, batch)) == expected


@pytest.mark.parametrize("training", [True, False])
def test_all_three_run(training):
    for which in ("ours", "reference", "floor"):
        prepare("laptop", which, training)()
