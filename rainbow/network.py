"""One network, analysed: its weight layers, the order of its calls and its steps, found once and handed on."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rainbow.channels import Channels, following, layout
from rainbow.errors import RainbowError
from rainbow.layers import Layer, LinearLayer, Skipped
from rainbow.norms import Norm
from rainbow.program import Architecture, Program
from rainbow.running import device_of, evaluating, first_images


@dataclass(frozen=True, eq=False)
class Network:
    """A network and what one dry forward pass of it showed. Made by `analyse`.

    example: two images, None if there were none; layers: the weight layers, in forward order (without an example, as
    they were defined); calls: the names of all modules with parameters or running statistics of their own, in the order
    of their first calls; repeated: how often, for those called more than once; skipped: what is not analysed,
    by name; unsampled: what is analysed but cannot be drawn; functional: the
    matrices that functions take after the first layer.
    """

    module: nn.Module
    example: Tensor | None
    layers: tuple[Layer, ...]
    calls: tuple[str, ...]
    repeated: dict[str, int]
    skipped: dict[str, Skipped]
    unsampled: dict[str, str]
    functional: tuple[str, ...]

    @cached_property
    def program(self) -> Program:
        """The network as steps. Raises RainbowError without an example."""
        if self.example is None:
            raise RainbowError(f"{type(self.module).__name__} was analysed without images: give some")
        return Program(self.module, self.example)

    def select(self, wanted: Any = None) -> list[Layer]:
        """All layers, or those wanted: a name or a pattern ("layer3.*"), a type of module, a function of a `Layer` that
        says yes or no, or several names and patterns, in their order.

        Raises RainbowError for a name that is unknown or given twice, and where nothing matches.
        """
        if wanted is None:
            return list(self.layers)
        if isinstance(wanted, type):
            return self._matching(lambda layer: isinstance(layer.module, wanted), f"is a {wanted.__name__}")
        if callable(wanted):
            return self._matching(wanted, "is wanted by the function")
        known, chosen = {layer.name: layer for layer in self.layers}, list[str]()
        for name in [wanted] if isinstance(wanted, str) else wanted:
            matches = fnmatch.filter(known, name) if isinstance(name, str) and name not in known else []
            chosen += [match for match in matches if match not in chosen] or [self._find(name, known)]
        for name in chosen:
            if chosen.count(name) > 1:
                raise RainbowError(f"layer {name} is asked for {chosen.count(name)} times")
        return [known[name] for name in chosen]

    def _matching(self, condition, text):
        chosen = [layer for layer in self.layers if condition(layer)]
        if not chosen:
            raise RainbowError(f"no weight layer of {type(self.module).__name__} {text}")
        return chosen

    def _find(self, name, known):
        if name in self.skipped:
            raise RainbowError(f"layer {name} is not analysed: {self.skipped[name].reason}")
        return find_name(name, known)

    def rebind(self, module: nn.Module) -> Network:
        """The same of a copy of the network with other weights or widths."""
        layers = (replace(layer, module=module.get_submodule(layer.name)) for layer in self.layers)
        return replace(self, module=module, layers=tuple(layers))


def weight_layers(model: nn.Module, example_or_loader: Any = None, names: Any = None) -> list[Layer]:
    """The weight layers of a network in forward order, all of them or those that `Network.select` finds.

    `example_or_loader`: a batch of images, or anything that yields (images, labels): one forward pass of it, with
    hooks, finds the order of the layers and what is flattened in front of them. Without it, networks of a registered
    architecture make their own example, and others give their layers in the order in which they were defined.

    Raises RainbowError if the network has no weight layer, offers no hooks, or has no layer of a given name.
    """
    return analyse(model, example_or_loader).select(names)


def find_name(name: str, known: Iterable[str]) -> str:
    """The name itself if it is known; otherwise RainbowError with the nearest known ones."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
    raise RainbowError(f"no weight layer {name!r} in this network; {hint}")


def analyse(model: nn.Module | Network, example_or_loader: Any = None) -> Network:
    """Analyses a network, unless that was done before, by one dry forward pass; else as `weight_layers`."""
    if isinstance(model, Network):
        return model
    check_module(model)
    names = {module: name for name, module in model.named_modules() if Layer.find(module) or _has_own(module)}
    example = make_example(model, example_or_loader)
    seen = _Seen(model, names) if example is None else _dry_pass(model, names, example)
    layers, skipped = list[Layer](), seen.parameters()
    for module in [*seen.counts, *(module for module in names if module not in seen.counts)]:
        adapter, name = Layer.find(module), names[module]
        if adapter is None:
            skipped = _other_weights(name, module) | skipped
        elif module not in seen.counts:
            skipped[name] = Skipped("not called in a forward pass")
        elif (refusal := adapter.refusal(module) or seen.refusal(module)) is not None:
            skipped[name] = refusal
        else:
            layers.append(adapter.of(name, module, *seen.layout(module)))
    if not layers:
        reasons = [f"; {name}: {reason}" for name, (reason, _) in list(skipped.items())[:3]]
        raise RainbowError(
            f"{type(model).__name__} has no linear layer or convolution that can be analysed" + "".join(reasons)
        )
    repeated = {names[module]: count for module, count in seen.counts.items() if count > 1}
    calls = tuple(names[module] for module in seen.counts)
    unsampled, functional = _unsampled(layers, seen), tuple(n for n, count in seen.channels.used.items() if count)
    return Network(model, example, tuple(layers), calls, repeated, skipped, unsampled, functional)


def check_module(model: nn.Module) -> None:
    """Raises RainbowError if this is no network that can be analysed."""
    if not isinstance(model, nn.Module):
        raise RainbowError(f"a network is a torch.nn.Module, got a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise RainbowError(f"{type(model).__name__} is compiled and offers no hooks: give the module it was made from")


def check_finite(layers: Iterable[Layer]) -> None:
    """Raises RainbowError if a weight is not finite, naming the layer and how many there are."""
    for layer in layers:
        bad = int((~torch.isfinite(layer.weight.abs())).sum())
        if bad:
            raise RainbowError(
                f"layer {layer.name}: {bad} of its {layer.weight.numel()} weights are not finite (NaN or "
                "infinite); the training has diverged, analyse an earlier epoch"
            )


def make_example(model: nn.Module, example_or_loader: Any = None) -> Tensor | None:
    """Two images for a dry forward pass, on the network's device; None if nothing says what they look like."""
    if example_or_loader is None:
        example = Architecture.of(model).example()
    elif isinstance(example_or_loader, Tensor):
        example = example_or_loader
    else:
        first = next(iter(example_or_loader), None)
        example = None if first is None else first_images(first)
    return None if example is None else example[:2].to(device_of(model))


def _has_own(module):
    return next(module.parameters(recurse=False), None) is not None or Norm.find(module) is not None


def _other_weights(name, module):
    """Matrices of parameters that belong to no weight layer, as in attention or embeddings."""
    reason = Skipped(f"a weight of {type(module).__name__}, not a linear layer")
    matrices = [key for key, parameter in module.named_parameters(recurse=False) if _is_matrix(parameter)]
    return {f"{name}.{key}".lstrip("."): reason for key in matrices}


def _is_matrix(parameter):
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1


class _Seen:
    """What a dry pass shows: how often each module is called, in the order of first calls, and the channels of the
    layers' inputs. Without a pass, the modules count as called once, in the order in which they were defined."""

    def __init__(self, model, names):
        self.names, self.channels = names, Channels(model)
        self.registered = Architecture.find(model) is not Architecture
        self.counts = dict.fromkeys(names, 1)
        self.inputs: dict[nn.Module, Tensor | str | None] = {}
        self.flat: dict[nn.Module, tuple[int, ...]] = {}

    def note(self, module, args):
        self.counts[module] = self.counts.get(module, 0) + 1
        adapter = Layer.find(module)
        if self.counts[module] == 1 and adapter and args:
            self.inputs[module] = self.channels.along(args[0], adapter.channel_axis)
            shape = self.channels.flat.get(args[0], ())
            if issubclass(adapter, LinearLayer) and math.prod(shape[1:]) > 1:
                unknown = self.inputs[module] is None and self.channels.makers and not self.registered
                self.flat[module] = () if unknown else shape

    def refusal(self, module) -> Skipped | None:
        """Why the channels of a layer's input are not known."""
        found = self.inputs.get(module)
        if isinstance(found, str):
            return Skipped(found)
        if self.flat.get(module) == ():
            return Skipped("its input is flattened, and what made it does not say which axis has the channels")
        if self._layout(module) is None:
            return Skipped("its input joins channels of different numbers of positions")
        return None

    def layout(self, module) -> tuple[tuple[int, ...], bool]:
        """The kernel of a linear layer, and whether the channels of its input come last."""
        channels, last = self._layout(module) or (0, False)
        found, shape = self.inputs.get(module), self.flat.get(module, ())
        positions = found.numel() // channels if isinstance(found, Tensor) and channels else math.prod(shape[1:])
        maps = shape[:-1] if last else shape[1:]
        if len(shape) == 3 and math.prod(maps) == positions:
            return maps, last
        return ((positions,) if isinstance(found, Tensor) and positions > 1 else (1, 1)), last

    def _layout(self, module):
        """`channels.layout` of a linear layer's input, (0, False) for another or an input without labels."""
        found, adapter = self.inputs.get(module), Layer.find(module)
        if adapter is None or not issubclass(adapter, LinearLayer) or not isinstance(found, Tensor):
            return 0, False
        return layout(self.channels.one.of(found.flatten()))

    def parameters(self) -> dict[str, Skipped]:
        """The matrices that functions take instead of modules."""
        known = {id(p) for module in self.names if Layer.find(module) for p in module.parameters()}
        parameters = self.channels.model.named_parameters()
        matrices = [name for name, p in parameters if _is_matrix(p) and id(p) not in known]
        used = self.channels.used
        return {
            name: Skipped("used by a function, not as a layer", used[name] == 0) for name in matrices if name in used
        }


def _unsampled(layers, seen):
    """Layers that are analysed, but whose weights cannot be drawn by themselves, and why."""
    names, reasons, owners = {layer.name for layer in layers}, dict[str, str](), dict[int, str]()
    for a, b in sorted(seen.channels.multiplied):
        text = "its neurons are multiplied with each other" if a == b else "its outputs are multiplied with those of "
        for name, other in ((a, b), (b, a)):
            if name in names:
                reasons.setdefault(
                    name, (text if a == b else text + other) + ": drawn independently, they do not agree"
                )
    for layer in layers:
        if layer.parameter not in layer.module._parameters:
            reasons[layer.name] = "its weight is computed from other parameters (pruning, weight norm, ...)"
            continue
        owner = owners.setdefault(id(getattr(layer.module, layer.parameter)), layer.name)
        if owner != layer.name:
            reasons[layer.name] = f"its weight is that of {owner}"
    return reasons


def _dry_pass(model, names, example):
    """Runs the network on an example and sees what there is to see."""
    seen = _Seen(model, names)
    seen.counts = {}
    hooks = [module.register_forward_pre_hook(seen.note) for module in names]
    try:
        with evaluating(model), following(seen.channels, names):
            model(example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        line, shape = (str(error).splitlines() or [""])[0], tuple(example.shape)
        raise RainbowError(f"{type(model).__name__} cannot process images of shape {shape}: {line}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen
