"""The layout of columns: what W does to channels, its real matrices do to columns."""

import itertools

import pytest
import torch

from models.planar import ColumnLayout, from_planar, to_planar
from models.projection import apply_weight
from tests.rounding import assert_values, of_sum


@pytest.fixture(params=itertools.product((False, True), (False, True)), ids=["real", "complex", "skip", "complex skip"])
def layout_and_weight(request):
    skip, is_complex = request.param
    layout = ColumnLayout(channels=3, filters=4, skip=skip)
    return layout, torch.randn(5, 15 * (1 + skip), dtype=torch.cfloat if is_complex else torch.float)


def test_folded_weights_are_the_weights_on_scaled_features(layout_and_weight):
    layout, weight = layout_and_weight
    columns, scale = torch.randn(2, 6, 7, layout.width), torch.rand(layout.width)
    ours = columns @ torch.block_diag(*layout.fold(weight, scale)).T
    theirs = apply_weight(weight, layout.features_of(scale * columns))
    assert_values(ours, to_planar(theirs), layout.width, 2)


def test_unfolding_is_the_adjoint_of_folding(layout_and_weight):
    layout, weight = layout_and_weight
    scale = torch.rand(layout.width)
    folded = layout.fold(weight, scale)
    gradients = [torch.randn_like(matrix) for matrix in folded]
    ours = (weight.conj() * layout.unfold(gradients, weight, scale)).sum().real
    terms = sum((a * b).double().flatten().abs().sum() for a, b in zip(folded, gradients))
    error = ours - sum((a * b).sum() for a, b in zip(folded, gradients))
    assert error.abs() <= 2 * of_sum(weight.numel()) * terms


@pytest.mark.parametrize("skip", [False, True])
def test_statistics_of_columns_are_those_of_channels(skip):
    layout = ColumnLayout(channels=3, filters=4, skip=skip)
    mean, var = torch.randn(layout.width), layout.tied(torch.rand(layout.width))
    there_and_back = layout.to_columns(*layout.to_channels(mean, var))
    assert torch.equal(there_and_back[0], mean) and torch.equal(there_and_back[1], var)


@pytest.mark.parametrize("parts, dtype", [(1, torch.float), (2, torch.cfloat)])
def test_planar_maps_are_the_same_maps(parts, dtype):
    x = torch.randn(2, 3, 4, 5, dtype=dtype)
    assert to_planar(x).shape == (2, 4, 5, 3 * parts) and torch.equal(from_planar(to_planar(x), parts), x)
