"""A network as a list of steps with named values, so that it can be continued from the middle.

The steps of a registered architecture are its own; those of any other network that `torch.fx` can trace are its
operations; what cannot be traced is one step. A step may hold weight layers and normalisations inside: their inputs are
then read by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from rainbow.channels import Channels, following
from rainbow.layers import Layer
from rainbow.norms import Norm
from rainbow.registry import Adapter, register
from rainbow.running import device_of, evaluating, input_of, output_of
from rainbow.samples import Samples

INPUT = "(images)"
Values = dict[str, Any]


class Step:
    """One operation: `call(values)` gives the value `name` from the values named `inputs`.

    holder: the module that runs, which may contain others; None for a function. copied: the inputs that the operation
    overwrites, so that it is given copies.
    """

    def __init__(
        self, name: str, inputs: Sequence[str], call: Callable[[Values], Any], holder: nn.Module | None = None
    ):
        self.name, self.inputs, self.call, self.holder = name, tuple(inputs), call, holder
        self.copied: tuple[str, ...] = ()

    def run(self, values: Values) -> Any:
        """The step's value; the others stay as they are."""
        return self.call({**values, **{name: values[name].clone() for name in self.copied}})

    def holds(self, module: nn.Module) -> bool:
        """Whether a module runs in this step."""
        return self.holder is not None and any(inner is module for inner in self.holder.modules())

    def resumes(self, module: nn.Module) -> bool:
        """Whether the step can be continued from the input of a module: if that is the step's own."""
        return self.holder is module

    def resume(self, module: nn.Module, value: Tensor, values: Values) -> Any:
        """The step's value, from another input of a module."""
        return self.run({**values, self.inputs[0]: value})

    def input_of(self, module: nn.Module, values: Values) -> Tensor:
        """The input of a module that runs in this step."""
        return values[self.inputs[0]] if self.holder is module else input_of(module, lambda: self.run(values))

    def norm_of(self, layer: nn.Module) -> nn.Module | None:
        """The normalisation in this step whose output is the input of a layer in this step."""
        return None

    def samples_of(self, module: nn.Module, values: Values, layer: Layer | None) -> Samples:
        """The input of a module as samples of channels: as its layer has them, or the normalisation that it is."""
        taker = Norm.of(module) if layer is None else layer
        return Samples.of(taker.samples(self.input_of(module, values)))


class Architecture(Adapter):
    """How the networks of a class are run and rebuilt, if there is a better way than tracing their operations.

    As it is, it knows nothing: every method may be left out.
    """

    role: ClassVar[str] = "architecture"

    def __init__(self, module: Any):
        self.module = module

    @classmethod
    def of(cls, module: nn.Module) -> Architecture:
        """The one that is registered for the network's class."""
        return (cls.find(module) or cls)(module)

    def example(self) -> Tensor | None:
        """Two images that the network can process."""
        return None

    def steps(self, example: Tensor) -> list[Step] | None:
        """The network as steps between its layers."""
        return None

    def stream(self, layers: Sequence[Layer], images: Tensor, patches: bool, receive: Callable[..., None]) -> bool:
        """Calls `receive` with samples of every layer, as `moments.stream_samples` does. False if it cannot."""
        return False

    def resized(self, widths: Mapping[str, int]) -> nn.Module | None:
        """A copy whose layers, by name, have other numbers of neurons. Values stay if their shapes do.

        Raises ValueError if the widths do not fit.
        """
        return None


register(nn.Module, Architecture)


class Program:
    """The steps of a network. Positions count steps: at position p, steps 0..p-1 are done.

    Its modules are the network's own: a changed weight is seen at once.
    """

    def __init__(self, network: nn.Module, example: Tensor):
        """example: (B, ...) images, to see that the steps do what the network does, and how large their values are."""
        self.network = network
        self._axes: dict[str, int | None] = {}
        traced = Architecture.of(network).steps(example) or _traced_steps(network)
        whole = Step("output", (INPUT,), lambda values: network(values[INPUT]), network)
        with torch.inference_mode(False), evaluating(network):
            example = example.to(device_of(network)).clone()
            if traced is None or not self._verify(traced, example):
                self._verify([whole], example)

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
        step, before = self.step_of(layer), self.step_of(norm)
        if step.norm_of(layer) is norm:
            return True
        return before.holder is norm and step.holder is layer and step.inputs[0] == before.name

    def live(self, position: int) -> list[str]:
        """The names of the values that exist at a position and are needed from there on."""
        return [name for name, (first, last) in self._lifetimes.items() if first <= position <= last]

    def axis_of(self, name: str) -> int:
        """The axis of a value's channels: known from what makes it, or that of images."""
        axis = self._axes.get(name)
        return (1 if self._ndim[name] > 3 else -1) if axis is None else axis

    def bytes_at(self, position: int) -> int:
        """Memory of the live values at a position, for one image."""
        return sum(self._sizes[name] for name in self.live(position))

    def run(self, values: Values, start: int, stop: int) -> Values:
        """The values live at position `stop`, from those live at `start`."""
        values = dict(values)
        for position in range(start, stop):
            step = self.steps[position]
            values[step.name] = step.run(values)
            for name in step.inputs:
                if self._lifetimes[name][1] <= position:
                    values.pop(name, None)
        return {name: values[name] for name in self.live(stop)}

    def finish(self, module: nn.Module, value: Tensor, values: Values) -> Tensor:
        """The network's output from the values live at a module's step, with another input of the module."""
        position = self.place(module)
        step = self.steps[position]
        values = {**values, step.name: step.resume(module, value, values)}
        return self.run(values, position + 1, self.end)[self.output]

    def _verify(self, steps, example):
        """Takes the steps; notes sizes and what is overwritten. Whether they compute what the network does."""
        expected, values, self._sizes = self.network(example), {INPUT: example}, {INPUT: _bytes(example)}
        self.steps, self._lifetimes, self._ndim = steps, _lifetimes(steps), {INPUT: example.ndim}
        channels = Channels(self.network)
        with following(channels, {module: name for name, module in self.network.named_modules()}):
            complete = self._run_all(steps, values, channels)
        out = output_of(values.get(self.output))
        expected = output_of(expected)
        same = isinstance(expected, Tensor) and isinstance(out, Tensor) and expected.shape == out.shape
        return complete and same and torch.allclose(expected, out, rtol=1e-2, atol=1e-3, equal_nan=True)

    def _run_all(self, steps, values, channels):
        for step in steps:
            copies = {name: values[name].clone() for name in step.inputs if isinstance(values[name], Tensor)}
            versions = {name: copy._version for name, copy in copies.items()}
            try:
                out = values[step.name] = step.call({**values, **copies})
            except Exception:  # an operation of a trace may be anything
                return False
            self._axes[step.name], self._ndim[step.name] = channels.axis(out), getattr(out, "ndim", 0)
            step.copied = tuple(name for name, copy in copies.items() if copy._version != versions[name])
            self._sizes[step.name] = _bytes(out)
        return True


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


class _Tracer(fx.Tracer):
    """Goes into modules that hold weight layers or normalisations; the others are single steps."""

    def is_leaf_module(self, module, name):
        inner = [m for m in module.modules() if m is not module]
        return not any(Layer.find(m) or Norm.find(m) for m in inner)


def _traced_steps(network):
    """The steps of a network of one input and one output that `torch.fx` can trace, else None."""
    try:
        graph = _Tracer().trace(network)
    except Exception:  # whatever a module does with the symbols it is traced with
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = [node.args[0] for node in graph.nodes if node.op == "output"]
    if len(inputs) != 1 or not isinstance(output, fx.Node) or output is inputs[0]:
        return None
    interpreter = fx.Interpreter(network, graph=graph)

    def name_of(node):
        return INPUT if node is inputs[0] else node.name

    def step_of(node):
        def call(values):
            interpreter.env = {source: values[name_of(source)] for source in node.all_input_nodes}
            return interpreter.run_node(node)

        holder = network.get_submodule(node.target) if node.op == "call_module" else None
        return Step(node.name, [name_of(source) for source in node.all_input_nodes], call, holder)

    steps = [step_of(node) for node in graph.nodes if node.op not in ("placeholder", "output")]
    if output.name != steps[-1].name:
        steps.append(Step("(output)", (output.name,), lambda values: values[output.name]))
    return steps
