"""Networks of other widths: which modules and parameters go with the neurons of a layer, and copies that have more or
fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from rainbow.errors import RainbowError
from rainbow.layers import Layer, set_shape
from rainbow.network import Network
from rainbow.norms import Norm
from rainbow.program import Architecture
from rainbow.running import device_of, evaluating


def neuron_parameters(network: Network) -> list[list[str]]:
    """For each layer, the names of the parameters that have one value (or m values) for each of its neurons.

    They are the layer's bias, and what comes between it and the next layer: affine maps, gains and thresholds.
    """
    layers = {layer.name: layer for layer in network.layers}
    owned: dict[str, list[str]] = {name: [] for name in layers}
    current = None
    for name in network.calls:
        current = layers.get(name, current)
        for key, parameter in network.module.get_submodule(name).named_parameters(recurse=False):
            if current is None or name in layers and key == layers[name].parameter or not parameter.ndim:
                continue
            if parameter.numel() == len(parameter) and len(parameter) % current.neurons == 0:
                owned[current.name].append(f"{name}.{key}".lstrip("."))
    return list(owned.values())


def resize(network: Network, widths: Sequence[int]) -> nn.Module:
    """A copy of the network whose layers but the last have the given numbers of neurons, its weights not yet set.

    Values stay if their shapes do. Raises RainbowError if the widths do not fit together (at the sum of a shortcut).
    """
    names = [layer.name for layer in network.layers]
    if list(widths) == [layer.neurons for layer in network.layers[:-1]]:
        return copy.deepcopy(network.module)
    try:
        resized = Architecture.of(network.module).resized(dict(zip(names, widths)))
    except ValueError as error:
        raise RainbowError(f"these widths fit no network: {error}") from error
    if resized is None:
        resized = copy.deepcopy(network.module)
        _refit(network.rebind(resized), neuron_parameters(network), widths)
    return resized


def _refit(network, owned, widths):
    """Gives the modules of a network the shapes that their inputs have when they first come by."""
    wanted = {layer.module: (layer, n) for layer, n in zip(network.layers, [*widths, network.layers[-1].neurons])}
    for names, layer, width in zip(owned, network.layers, widths):
        for owner, _, key in (name.rpartition(".") for name in names):
            module = network.module.get_submodule(owner)
            length = len(getattr(module, key)) // layer.neurons * width
            set_shape(module, key, (length, *getattr(module, key).shape[1:]))

    def before(module, args):
        if module in wanted:
            layer, neurons = wanted[module]
            layer.resize(neurons, args[0].shape[layer.channel_axis])
        elif Norm.find(module):
            Norm.of(module).resize(args[0].shape[1])

    handles = [network.module.get_submodule(name).register_forward_pre_hook(before) for name in network.calls]
    try:
        with evaluating(network.module):
            network.module(network.example.to(device_of(network.module)))
    except (RuntimeError, ValueError) as error:
        raise RainbowError(
            f"the widths {' '.join(map(str, widths))} do not fit together: {str(error).splitlines()[0]} "
            "(layers whose outputs are added need the same width)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def checked_widths(widths: Sequence[int] | None, layers: Sequence[Layer]) -> list[int]:
    """The widths of all layers but the last, by default their own. Raises RainbowError if they do not fit."""
    own = [layer.neurons for layer in layers[:-1]]
    if not own:
        raise RainbowError("a network of one layer has nothing to sample: its only layer is the classifier")
    if widths is None:
        return own
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise RainbowError(f"widths are a list of {len(own)} numbers of neurons, not {widths!r}")
    widths = list(widths)
    if len(widths) != len(own):
        raise RainbowError(
            f"{len(widths)} widths are given for {len(own)} layers before the classifier, whose widths are "
            f"{' '.join(map(str, own))}: give {len(own)}"
        )
    for width in widths:
        if isinstance(width, str) or int(width) != width or width < 1:
            raise RainbowError(f"a width is a positive integer, not {width}")
    return [int(width) for width in widths]
