"""A network as a list of steps with named values, so that it can be continued from the middle.

The steps of a registered architecture are its own; those of any other network that `torch.fx` can trace are its
operations; what cannot be traced is one step. A step may hold weight layers and normalisations inside: their inputs are
then read by hooks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rainbow.layers import Layer, evaluating
from rainbow.moments import input_of
from rainbow.norms import Norm
from rainbow.registry import Architecture
from rainbow.samples import Samples

INPUT = "x"
IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def channel_samples(x: Tensor, layer: Layer | None = None) -> Tensor:
    """A value as samples of channels: as the layer that takes it does, or (B, C, M, N) and (B, …, C) by themselves."""
    if layer is not None:
        return layer.samples(x)
    return x.movedim(1, -1).flatten(0, -2) if x.ndim > 3 else x.flatten(0, -2)


@dataclass(eq=False)
class Step:
    """One operation: `call(env)` gives the value `name` from the values named `inputs`.

    holder: the module that runs, which may contain others; None for a function.
    """

    name: str
    inputs: tuple[str, ...]
    call: Callable[[dict], object]
    holder: nn.Module | None = None

    def holds(self, module: nn.Module) -> bool:
        """Whether a module runs in this step."""
        return self.holder is not None and any(inner is module for inner in self.holder.modules())

    def resumes(self, module: nn.Module) -> bool:
        """Whether the step can be continued from the input of a module: if that is the step's own."""
        return self.holder is module

    def resume(self, module: nn.Module, value: Tensor, env: dict) -> object:
        """The step's value, from another input of a module."""
        return self.call({**env, self.inputs[0]: value})

    def input_of(self, module: nn.Module, env: dict) -> Tensor:
        """The input of a module that runs in this step."""
        return env[self.inputs[0]] if self.holder is module else input_of(module, lambda: self.call(env))

    def norm_of(self, layer: nn.Module) -> nn.Module | None:
        """The normalisation in this step whose output is the input of a layer in this step."""
        return None

    def samples_of(self, module: nn.Module, env: dict, layer: Layer | None) -> Samples:
        """The same as samples of channels."""
        return Samples.of(channel_samples(self.input_of(module, env), layer))


class Program:
    """The steps of a network. Positions count steps: at position p, steps 0..p-1 are done.

    Its modules are the network's own: a changed weight is seen at once.
    """

    def __init__(self, network: nn.Module, example: Tensor):
        """example: (B, ...) images, to see that the steps do what the network does, and how large their values are."""
        self.network = network
        steps = Architecture.find(network)(network).steps(example) or _traced_steps(network)
        with evaluating(network):
            self.steps = self._checked(steps, example) or [_whole(network)]
            self._lifetimes = _lifetimes(self.steps)
            self._measure(example)

    @property
    def end(self) -> int:
        """The position after the last step."""
        return len(self.steps)

    @property
    def output(self) -> str:
        """The name of the network's output."""
        return self.steps[-1].name

    def place(self, module: nn.Module) -> int:
        """The position of the step that a module runs in."""
        exact = [position for position, step in enumerate(self.steps) if step.holder is module]
        return exact[0] if exact else next(p for p, step in enumerate(self.steps) if step.holds(module))

    def step_of(self, module: nn.Module) -> Step:
        """The step that a module runs in."""
        return self.steps[self.place(module)]

    def leads_to(self, norm: nn.Module, layer: nn.Module) -> bool:
        """Whether a layer's input is a normalisation's output, position for position."""
        step = self.step_of(layer)
        if step.norm_of(layer) is norm:
            return True
        before = self.step_of(norm)
        return before.holder is norm and step.holder is layer and step.inputs[0] == before.name

    def live(self, position: int) -> list[str]:
        """The names of the values that exist at a position and are needed from there on."""
        return [name for name, (first, last) in self._lifetimes.items() if first <= position <= last]

    def bytes_at(self, position: int) -> int:
        """Memory of the live values at a position, for one image."""
        return sum(self._sizes.get(name, 0) for name in self.live(position))

    def run(self, env: dict, start: int, stop: int) -> dict:
        """The values live at position `stop`, from those live at `start`."""
        env = dict(env)
        for position in range(start, stop):
            step = self.steps[position]
            env[step.name] = step.call(env)
            for name in step.inputs:
                if self._lifetimes[name][1] <= position:
                    env.pop(name, None)
        return {name: env[name] for name in self.live(stop)}

    def finish(self, module: nn.Module, value: Tensor, env: dict) -> Tensor:
        """The network's output from the values live at a module's step, with another input of the module."""
        position = self.place(module)
        step = self.steps[position]
        env = {**env, step.name: step.resume(module, value, env)}
        return self.run(env, position + 1, self.end)[self.output]

    def _checked(self, steps, example):
        """The steps, or None if they do not compute what the network does."""
        if steps is None:
            return None
        self.steps = steps
        self._lifetimes = _lifetimes(steps)
        expected, found = self.network(example), self.run({INPUT: example}, 0, self.end)[self.output]
        same = isinstance(expected, Tensor) and torch.allclose(expected, found, rtol=1e-2, atol=1e-3, equal_nan=True)
        return steps if same else None

    def _measure(self, example):
        """Notes the size of every value, in bytes for one image."""
        env, self._sizes = {INPUT: example}, {INPUT: _bytes(example)}
        for step in self.steps:
            env[step.name] = step.call(env)
            self._sizes[step.name] = _bytes(env[step.name])


def _lifetimes(steps):
    """For every value, the first and the last position at which it exists and is still needed."""
    lifetimes = {INPUT: (0, 0)}
    for position, step in enumerate(steps):
        for name in step.inputs:
            lifetimes[name] = (lifetimes[name][0], position)
        lifetimes[step.name] = (position + 1, position + (position + 1 == len(steps)))
    return lifetimes


def _bytes(value):
    return value.element_size() * value.numel() // max(len(value), 1) if isinstance(value, Tensor) and value.ndim else 0


def _whole(network):
    return Step("output", (INPUT,), lambda env: network(env[INPUT]), network)


class _Tracer(fx.Tracer):
    """Goes into modules that hold linear layers or convolutions; the others are single steps."""

    def is_leaf_module(self, module, name):
        inner = [m for m in module.modules() if m is not module]
        return not any(Layer.find(m) or Norm.find(m) for m in inner)


def _traced_steps(network):
    """The steps of a network that `torch.fx` can trace, else None."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(network)
    except Exception:  # whatever a module does with the symbols it is traced with
        return None
    modules = dict(network.named_modules())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        return None
    names = {placeholders[0]: INPUT}
    steps, output = [], None
    for node in graph.nodes:
        if node.op == "output":
            output = node.args[0]
        elif node.op != "placeholder":
            names[node] = node.name
            steps.append(_traced_step(node, names, modules, network))
    if not isinstance(output, fx.Node) or not steps:
        return None
    if names[output] != steps[-1].name:
        steps.append(Step("output", (names[output],), lambda env: env[names[output]]))
    return steps


def _traced_step(node, names, modules, network):
    inputs = tuple(dict.fromkeys(names[n] for n in node.all_input_nodes))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}

    def arguments(env):
        return fx.node.map_arg(node.args, lambda n: env[names[n]]), fx.node.map_arg(kwargs, lambda n: env[names[n]])

    if node.op == "get_attr":
        return Step(node.name, inputs, lambda env: operator.attrgetter(node.target)(network))
    if node.op == "call_module":
        function = modules[node.target]
    else:
        function = IN_PLACE.get(node.target, node.target)

    def call(env):
        args, kw = arguments(env)
        if node.op == "call_method":
            method = node.target if node.target.endswith("__") else node.target.removesuffix("_")  # not in place
            return getattr(args[0], method)(*args[1:], **kw)
        return function(*args, **kw)

    return Step(node.name, inputs, call, modules[node.target] if node.op == "call_module" else None)
