"""The public face: what it imports, the docstrings' examples, and layers that are registered from outside."""

import doctest
import subprocess
import sys

import pytest
import torch
from torch import nn

import rainbow
from rainbow import analysis, registry


@pytest.mark.parametrize("module, examples", [(analysis, 9), (registry, 7)])
def test_the_examples_in_docstrings_run(module, examples):
    result = doctest.testmod(module)
    assert result.attempted >= examples and result.failed == 0


def test_the_library_imports_nothing_else_of_the_repository():
    code = "import sys, rainbow; print(*[m for m in sys.modules if m.split('.')[0] in ('models', 'utils', 'tests')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_nearest_registered_class_counts():
    class Mine(nn.Linear):
        pass

    class MyLayer(rainbow.Layer):
        pass

    assert rainbow.Layer.find(Mine(1, 1)) is rainbow.Layer.find(nn.Linear(1, 1))
    rainbow.register(Mine, MyLayer)
    assert rainbow.Layer.find(Mine(1, 1)) is MyLayer
    assert rainbow.Layer.find(nn.Linear(1, 1)) is not MyLayer
    assert rainbow.Norm.find(Mine(1, 1)) is None


@pytest.mark.parametrize(
    "module_class, adapter", [(object, rainbow.Layer), (nn.ReLU, object), (nn.ReLU(), rainbow.Norm)]
)
def test_only_adapters_of_modules_can_be_registered(module_class, adapter):
    with pytest.raises(TypeError):
        rainbow.register(module_class, adapter)


def test_a_weight_that_is_computed_is_not_set():
    network = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    (layer,) = rainbow.weight_layers(nn.Sequential(network), torch.randn(2, 4))
    with pytest.raises(rainbow.RainbowError, match="computed from other parameters"):
        layer.set(layer.get())
