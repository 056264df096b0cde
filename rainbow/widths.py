"""Networks of other widths: which modules and parameters go with the neurons of a layer, and copies that have more or
fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from rainbow.errors import RainbowError
from rainbow.layers import Layer, evaluating, set_shape
from rainbow.norms import Norm
from rainbow.registry import Architecture


def call_order(network: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters or running statistics of their own, in the order of their first calls."""
    order, handles = [], []

    def hook(name):
        def before(module, args):
            if (name, module) not in order:
                order.append((name, module))

        return before

    for name, module in network.named_modules():
        own = next(module.parameters(recurse=False), None) is not None or Norm.find(module) is not None
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
            is_weight = module in position and key == layers[position[module]].parameter
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

    Where shapes stay, so do values. Raises RainbowError if the widths do not fit together (at the sum of a shortcut).
    """
    if list(widths) == [layer.neurons for layer in layers[:-1]]:
        return copy.deepcopy(network)
    names = [layer.name for layer in layers[:-1]]
    try:
        resized = Architecture.find(network)(network).resized(dict(zip(names, widths)))
    except ValueError as error:
        raise RainbowError(f"these widths fit no network: {error}") from error
    if resized is not None:
        return resized
    return _resize_modules(network, layers, widths, example, calls)


def _resize_modules(network, layers, widths, example, calls):
    """Modules take the shape that their input has when it first comes by."""
    resized = copy.deepcopy(network)
    modules = dict(resized.named_modules())
    wanted = {
        modules[layer.name]: (replace(layer, module=modules[layer.name]), width)
        for layer, width in zip(layers, [*widths, layers[-1].neurons])
    }
    for names, layer, width in zip(neuron_parameters(calls, layers), layers, widths):
        for owner, _, key in (name.rpartition(".") for name in names):
            old = getattr(modules[owner], key)
            shape = (old.shape[0] // layer.neurons * width, *old.shape[1:])
            set_shape(modules[owner], key, shape)

    def before(module, args):
        _fit(module, args[0], *wanted.get(module, (None, None)))

    handles = [modules[name].register_forward_pre_hook(before) for name, _ in calls]
    try:
        with evaluating(resized):
            resized(example)
    except (RuntimeError, ValueError) as error:
        raise RainbowError(
            f"the widths {' '.join(map(str, widths))} do not fit together: {str(error).splitlines()[0]} "
            "(layers whose outputs are added need the same width)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return resized


def _fit(module, x, layer, neurons):
    """Gives a layer, of so many `neurons`, or a normalisation the shape that its input needs."""
    if layer is not None:
        layer.resize(neurons, x.shape[layer.channel_axis])
    elif (norm := Norm.of(module)) is not None:
        norm.resize(x.shape[1])


def checked_widths(widths: Sequence[int] | None, layers: Sequence[Layer]) -> list[int]:
    """The widths of all layers but the last, by default their own. Raises RainbowError where they do not fit."""
    own = [layer.neurons for layer in layers[:-1]]
    if not own:
        raise RainbowError("a network of one layer has nothing to sample: its only layer is the classifier")
    if widths is None:
        return own
    widths = list(widths)
    if len(widths) != len(own):
        raise RainbowError(
            f"{len(widths)} widths are given for {len(own)} layers before the classifier, whose widths are "
            f"{' '.join(map(str, own))}: give {len(own)}"
        )
    for width in widths:
        if int(width) != width or width < 1:
            raise RainbowError(f"a width is a positive integer, not {width}")
    return [int(width) for width in widths]
