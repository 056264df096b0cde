"""A network as a list of steps with named values, so that it can be continued from the middle.

A scattering network is cut before and after the standardisation of each block; any other network that `torch.fx` can
trace, at each of its operations; what cannot be traced is one step. A step may hold weight layers and normalisations
inside: their inputs are then read by hooks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from models.scatnet import ScatNet
from models.standardization import Standardization
from utils.layers import evaluating

INPUT = "x"
IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
            operator.itruediv: operator.truediv}
NORMS = (nn.modules.batchnorm._BatchNorm, Standardization)


@dataclass(frozen=True, eq=False)
class Step:
    """One operation: `call(env)` gives the value `name` from the values named `inputs`.

    entry: the module, if any, whose input is the step's first input (the module itself is the step, or its beginning);
    holder: the module that the step runs, which may contain others.
    """

    name: str
    inputs: tuple[str, ...]
    call: Callable[[dict], object]
    holder: nn.Module | None = None
    entry: nn.Module | None = None


class _Reached(Exception):
    """Ends a step inside which a module was reached."""


def input_of(module: nn.Module, call: Callable[[], object]) -> Tensor:
    """The input of a module that runs somewhere in `call()`, which goes no further."""
    found = []

    def before(_, args):
        found.append(args[0])
        raise _Reached

    handle = module.register_forward_pre_hook(before)
    try:
        call()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


class Program:
    """The steps of a network. `position`s count steps: at position p, steps 0..p-1 are done.

    Its modules are the network's own: a changed weight is seen at once.
    """

    def __init__(self, network: nn.Module, example: Tensor):
        """example: (B, ...) images, to see that the steps do what the network does, and how large their values are."""
        self.network = network
        with evaluating(network):
            self.steps = self._checked(_steps(network), example) or [_whole(network)]
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

    def place(self, module: nn.Module) -> tuple[int, bool]:
        """Where a module runs: the position of its step, and whether its input is the step's own."""
        for position, step in enumerate(self.steps):
            if step.entry is module:
                return position, True
        for position, step in enumerate(self.steps):
            if step.holder is not None and any(inner is module for inner in step.holder.modules()):
                return position, False
        raise ValueError(f"{type(module).__name__} is not part of the network")

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

    def input_of(self, module: nn.Module, env: dict, position: int) -> Tensor:
        """The input of a module of the step at `position`, from the values live there."""
        step = self.steps[position]
        if step.entry is module:
            return env[step.inputs[0]]
        return input_of(module, lambda: step.call(env))

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
    return Step("output", (INPUT,), lambda env: network(env[INPUT]), holder=network)


def _steps(network):
    if isinstance(network, ScatNet):
        return list(_scattering_steps(network))
    return _traced_steps(network)


def _scattering_steps(network) -> Iterable[Step]:
    yield Step("mixed", (INPUT,), lambda env: network.mix(env[INPUT]), network.mix)
    name = "mixed"
    for index, block in enumerate(network.blocks):
        for step in _block_steps(f"block{index}", name, block):
            yield step
            name = step.name
    yield Step("scores", (name,), lambda env, name=name: network.classifier(env[name]), network.classifier)


def _block_steps(prefix, source, block):
    """Up to the projection's input, cut before a standardisation that leads to it; then the projection."""
    raw, features, out = (f"{prefix}.{part}" for part in ("raw", "features", "out"))
    if block.P is None:
        yield Step(out, (source,), lambda env: block(env[source]), block)
        return
    stages = list(block.body)
    before = stages[stages.index(block.P) - 1] if stages.index(block.P) else None
    if isinstance(before, Standardization):
        inner = nn.ModuleList(stages[: stages.index(before)])
        yield Step(raw, (source,), lambda env: input_of(before, lambda: block.features(env[source])), inner)
        yield Step(features, (raw,), lambda env: before(env[raw]), before, before)
    else:
        yield Step(features, (source,), lambda env: block.features(env[source]), block)
    inner = nn.ModuleList(stages[stages.index(block.P) :])
    yield Step(out, (features,), lambda env: block.project(env[features]), inner, block.P)


class _Tracer(fx.Tracer):
    """Goes into modules that hold linear layers or convolutions; the others are single steps."""

    def is_leaf_module(self, module, name):
        inner = [m for m in module.modules() if m is not module]
        return not any(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, *NORMS)) for m in inner)


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
        return (fx.node.map_arg(node.args, lambda n: env[names[n]]), fx.node.map_arg(kwargs, lambda n: env[names[n]]))

    if node.op == "call_module":
        module = modules[node.target]
        entry = module if node.args and node.args[0] in names else None

        def call(env):
            args, kw = arguments(env)
            return module(*args, **kw)

        return Step(node.name, inputs, call, module, entry)
    if node.op == "get_attr":
        return Step(node.name, inputs, lambda env: operator.attrgetter(node.target)(network))
    if node.op == "call_method":
        method = node.target[:-1] if node.target.endswith("_") and not node.target.endswith("__") else node.target

        def call(env):
            (first, *rest), kw = arguments(env)
            return getattr(first, method)(*rest, **kw)

        return Step(node.name, inputs, call)
    function = IN_PLACE.get(node.target, node.target)

    def call(env):
        args, kw = arguments(env)
        return function(*args, **kw)

    return Step(node.name, inputs, call)
