"""Networks on devices that are not here: FakeTensorMode knows the shapes and devices of tensors, not their values."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.train_step import NETWORKS
from models import build
from models.config import BlockConfig, ScatNetConfig, StandardConfig
from models.fast import _FusedBlock
from models.names import STANDARD_NON_LINEARITIES
from models.planar import to_planar
from tests.models.test_fast import BLOCKS, pair
from tests.models.test_networks import GRAMMAR, RGB

CUDA = torch.device("cuda", 0)


def narrower(config):
    """With an eighth of the channels."""
    sizes = [
        {name: getattr(b, name) // 8 for name in ("Pr_size", "Pc_size") if getattr(b, name)} for b in config.blocks
    ]
    return replace(config, blocks=tuple(replace(b, **size) for b, size in zip(config.blocks, sizes)))


CONFIGS = [narrower(config) for config, _ in NETWORKS.values()]
CONFIGS += [ScatNetConfig(RGB, 10, (BlockConfig(tuple(arch.split()), **options),)) for arch, options in GRAMMAR]
CONFIGS += [
    StandardConfig(name, 10, RGB) for name in ("resnet18-custom", "resnet50-custom", "vgg11-custom", "resnet18")
]
CONFIGS += [StandardConfig("resnet18-custom", 10, RGB, non_linearity=tuple(STANDARD_NON_LINEARITIES))]


def moved(network):
    """The network with all of its tensors on the GPU, their values unknown."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return network


def images_of(config, device=CUDA):
    return torch.empty(2, config.input.channels, config.input.height, config.input.width, device=device)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_tensor_of_a_forward_pass_is_on_the_networks_device(config, fast):
    network = build(config)
    for block in getattr(network, "blocks", ()):
        block.fast = fast
    with FakeTensorMode():
        for training in (True, False):
            scores = moved(network).train(training)(images_of(config))
            assert scores.device == CUDA and scores.shape == (2, config.num_classes)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("config", CONFIGS[:2])
def test_several_processes_train_without_waiting_for_the_device(config, fast, monkeypatch):
    """Counts and sums over processes stay on the device: reading an unknown value is an error."""
    network, summed = build(config), []
    for block in network.blocks:
        block.fast = fast
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "all_reduce", summed.append)
    with FakeTensorMode():
        moved(network)(images_of(config))
    assert len(summed) >= 2 * len(network.blocks) and {tensor.device for tensor in summed} == {CUDA}


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]])
def test_a_second_device_anywhere_is_an_error(config):
    network = build(config)
    name = next(name for name, tensor in network.named_parameters() if tensor.dim() > 1)
    with FakeTensorMode():
        parent, _, last = name.rpartition(".")
        parameters = moved(network).get_submodule(parent)._parameters
        parameters[last] = nn.Parameter(torch.empty(parameters[last].shape))
        with pytest.raises(RuntimeError, match="(?i)devices?.*cpu|cpu.*devices?"):
            network(images_of(config))


@pytest.mark.parametrize("size", [(8, 8), (48, 64)], ids=["whole", "windows"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_backward_pass_of_a_block_stays_on_its_device(name, size):
    """Called by itself: torch's own engine asks for the device."""
    block, _, images = pair(name, size)
    weight = block.P.weight
    context = SimpleNamespace(needs_input_grad=(True, True), mark_non_differentiable=lambda *tensors: None)
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    with FakeTensorMode(), torch.no_grad():
        moved(block)
        x = block.fused.maps.split(to_planar(torch.empty(images.shape, dtype=images.dtype, device=CUDA))).contiguous()
        statistics = None if block.std is not None else block.fused._fixed_statistics(None, x)
        y, mean, var, _ = _FusedBlock.forward(context, x, block.P.weight, block.fused, statistics, None)
        found = _FusedBlock.backward(context, torch.empty_like(y), None, None, None)
    assert [each.shape for each in found[:2]] == [x.shape, weight.shape] and found[2:] == (None, None, None)
    assert {each.device for each in (y, mean, var, *found[:2])} == {CUDA}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_step_runs_without_values(config):
    """On the meta device, autograd and optimiser too."""
    network = build(config).to("meta")
    groups = network.parameter_groups(1e-4) if hasattr(network, "parameter_groups") else network.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True)
    network(images_of(config, "meta")).sum().backward()
    optimizer.step()
    learned = [p for p in network.parameters() if p.requires_grad]
    assert learned and all(p.grad.is_meta and p.grad.shape == p.shape for p in learned)
