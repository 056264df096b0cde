"""Networks of other widths: which modules and parameters go with the neurons of a layer, and copies that have more or
fewer of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.scatnet import ScatNet
from rainbow.layers import Layer, device_of, evaluating
from rainbow.program import NORMS
from utils.errors import UserError, as_user_error


def call_order(network: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters or running statistics of their own, in the order of their first calls."""
    order, handles = [], []

    def hook(name):
        def before(module, args):
            if (name, module) not in order:
                order.append((name, module))

        return before

    for name, module in network.named_modules():
        own = next(module.parameters(recurse=False), None) is not None or isinstance(module, NORMS)
        if own and name:
            handles.append(module.register_forward_pre_hook(hook(name)))
    try:
        with evaluating(network):
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return order


def neuron_parameters(calls: Sequence[tuple[str, nn.Module]], layers: Sequence[Layer]) -> list[list[str]]:
    """For each layer, the names of the parameters that have one value (or m values) for each of its neurons.

    They are the layer's bias, and what comes between it and the next layer: affine maps, gains and thresholds.
    """
    position = {layer.module: k for k, layer in enumerate(layers)}
    names, current = [[] for _ in layers], None
    for name, module in calls:
        current = position.get(module, current)
        if current is None:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            is_weight = module in position and key == "weight"
            if (
                not is_weight
                and parameter.ndim
                and parameter.numel() == parameter.shape[0]
                and parameter.shape[0] % layers[current].neurons == 0
            ):
                names[current].append(f"{name}.{key}")
    return names


def resize(
    network: nn.Module,
    layers: Sequence[Layer],
    widths: Sequence[int],
    example: Tensor,
    calls: Sequence[tuple[str, nn.Module]],
) -> nn.Module:
    """A copy of the network whose layers but the last have the given numbers of neurons, its weights not yet set.

    Where shapes stay, so do values. Raises UserError if the widths do not fit together (at the sum of a shortcut).
    """
    if list(widths) == [layer.neurons for layer in layers[:-1]]:
        return copy.deepcopy(network)
    if isinstance(network, ScatNet):
        return _resize_scattering(network, layers, widths)
    return _resize_modules(network, layers, widths, example, calls)


def _resize_scattering(network, layers, widths):
    by_module = {layer.module: width for layer, width in zip(layers, widths)}
    blocks = []
    for config, block in zip(network.config.blocks, network.blocks):
        if block.P in by_module:
            kind = next(name for name, module in block.body.named_children() if module is block.P)
            config = replace(
                config,
                projection_initialization=None,
                projection_eigenvalues=None,
                **{f"{kind}_size": by_module[block.P]},
            )
        blocks.append(config)
    with as_user_error("these widths fit no network: "), torch.random.fork_rng(devices=[]):
        resized = ScatNet(replace(network.config, blocks=tuple(blocks)))
    state = resized.state_dict()
    for name, tensor in network.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
    resized.load_state_dict(state)
    return resized.to(device_of(network))


def _resize_modules(network, layers, widths, example, calls):
    """Modules take the shape that their input has when it first comes by."""
    resized = copy.deepcopy(network)
    modules = dict(resized.named_modules())
    wanted = {modules[layer.name]: width for layer, width in zip(layers, [*widths, layers[-1].neurons])}
    for names, layer, width in zip(neuron_parameters(calls, layers), layers, widths):
        for owner, _, key in (name.rpartition(".") for name in names):
            old = getattr(modules[owner], key)
            shape = (old.shape[0] // layer.neurons * width, *old.shape[1:])
            _set_parameter(modules[owner], key, shape)

    def before(module, args):
        _fit(module, args[0], wanted.get(module))

    handles = [modules[name].register_forward_pre_hook(before) for name, _ in calls]
    try:
        with evaluating(resized):
            resized(example)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the widths {' '.join(map(str, widths))} do not fit together: {str(error).splitlines()[0]} "
            "(layers whose outputs are added need the same width)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return resized


def _fit(module, x, neurons):
    """Gives a layer, of so many `neurons`, or a normalisation the shape that its input needs."""
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = x.shape[-1], neurons
        _set_parameter(module, "weight", (neurons, x.shape[-1]))
    elif neurons is not None:
        module.in_channels, module.out_channels = x.shape[1], neurons
        _set_parameter(module, "weight", (neurons, x.shape[1], *module.weight.shape[2:]))
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = x.shape[1]
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.ndim and len(buffer) != x.shape[1]:
                setattr(module, key, buffer.new_full((x.shape[1],), float(key == "running_var")))


def _set_parameter(module, key, shape):
    """Random numbers of a new shape, until they are drawn: activations are neither 0 nor infinite."""
    old = getattr(module, key)
    if tuple(old.shape) != tuple(shape):
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(shape, dtype=old.dtype, generator=generator) / math.sqrt(math.prod(shape[1:]))
        setattr(module, key, nn.Parameter(value.to(old.device), requires_grad=old.requires_grad))


def checked_widths(widths: Sequence[int] | None, layers: Sequence[Layer]) -> list[int]:
    """The widths of all layers but the last, by default their own. Raises UserError where they do not fit."""
    own = [layer.neurons for layer in layers[:-1]]
    if not own:
        raise UserError("a network of one layer has nothing to sample: its only layer is the classifier")
    if widths is None:
        return own
    widths = list(widths)
    if len(widths) != len(own):
        raise UserError(
            f"{len(widths)} widths are given for {len(own)} layers before the classifier, whose widths are "
            f"{' '.join(map(str, own))}: give {len(own)}"
        )
    for width in widths:
        if int(width) != width or width < 1:
            raise UserError(f"a width is a positive integer, not {width}")
    return [int(width) for width in widths]
