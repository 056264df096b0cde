"""Rainbow networks: networks whose weights are drawn layer by layer from a trained network's covariances (section 4).

With Ĉ_j the covariance of the trained weights of layer j, and A_j the alignment of the trained network's activations
φ_{j-1} to those of the new network, whose layers before j are drawn already, layer j of the new network is

    W'_j = G Ĉ_j^{1/2} A_j,      G white (N_j', D_j).

A_1 is the identity. Between layers the new network's normalisations (`Std`, batch norms) take the mean and variance of
their inputs over the training set. The last layer is the trained one, rotated: W_{J+1} A_{J+1}. What a neuron has
beside its weights (a bias, the affine map of a batch norm, a threshold) is that of a trained neuron drawn at random.

The activations of both networks are kept at the furthest step that fits the memory, and continued from there; where
they do not fit, from the last step that did, or from the images.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rainbow.alignment import MeanNetwork, align, transport
from rainbow.covariance import WeightCovariance
from rainbow.errors import RainbowError
from rainbow.layers import device_of, evaluating, first_images, inspect, make_example, weight_layers
from rainbow.norms import Norm, normalized_product
from rainbow.precision import accumulation_device
from rainbow.program import INPUT, Program, channel_samples
from rainbow.samples import ChannelSums, ProductSum, Samples
from rainbow.widths import call_order, checked_widths, neuron_parameters, resize

METHODS = ("gaussian", "orthogonal", "white")
MOST_MEMORY = 8 << 30  # bytes of activations kept on a CPU unless told otherwise


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy with layers 1..`layer` sampled and the others trained and aligned; top-1 and top-5 in percent."""

    layer: int
    acc1: float
    acc5: float


@dataclass
class RainbowSample:
    """A sampled network, its alignments A_j (D_j, D_j') from the reference, and the accuracy after every layer."""

    network: nn.Module
    alignments: list[Tensor] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)


def draw_rows(covariance: WeightCovariance, rows: int, method: str, generator: torch.Generator) -> Tensor:
    """Random rows of second moment Ĉ: Gaussian; `orthogonal`, a random partial isometry times Ĉ^{1/2}, scaled so that
    E[WᴴW]/N = Ĉ (exactly Ĉ with at least as many rows as Ĉ has directions); or `white`, N(0, tr Ĉ / D). # (rows, D)
    """
    vectors = covariance.eigenvectors.cpu()
    if method == "white":
        white = torch.randn(rows, covariance.dimension, dtype=vectors.dtype, generator=generator)
        return white * math.sqrt(covariance.trace / covariance.dimension)
    directions = covariance.rank
    white = torch.randn(rows, directions, dtype=vectors.dtype, generator=generator)
    if method == "orthogonal":
        u, _, vh = torch.linalg.svd(white, full_matrices=False)
        white = u @ vh * math.sqrt(max(rows, directions))
    return (white * covariance.eigenvalues[:directions].cpu().sqrt()) @ vectors[:, :directions].mH


def draw_neurons(count: int, neurons: int, generator: torch.Generator) -> Tensor:
    """Which of `count` trained neurons each new one has its numbers beside the weights from. # (neurons,) int64"""
    return torch.randint(count, (neurons,), generator=generator)


class RainbowSampler:
    """Samples rainbow networks of a trained network, or of a set of them through their mean network."""

    def __init__(
        self,
        reference: MeanNetwork,
        loader: Iterable,
        *,
        test: Iterable | None = None,
        method: str = "gaussian",
        widths: Sequence[int] | None = None,
        align_on_test: bool = False,
        memory: int | None = None,
        progress: Callable[[Iterable, str], Iterable] | None = None,
    ):
        """reference: a `MeanNetwork`, of one network or more, of the same architecture. loader, test: (images, labels)
        of the training and test set, always in the same order; accuracies are of the test set, where there is one.
        method: "gaussian", "orthogonal" or "white". widths: N_j of the new network's layers but the last (default: the
        trained ones). align_on_test: the alignments A_j are those of the test set. memory: bytes of activations
        that may be kept (default: a part of what is free). progress: wraps each pass over the data, an iterable that
        comes with a text.

        Raises RainbowError for what cannot be sampled: a layer whose weights the analysis cannot treat, widths that do
        not fit, an unknown method.
        """
        if method not in METHODS:
            raise RainbowError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
        if align_on_test and test is None:
            raise RainbowError("alignment on the test set needs a test set")
        self.reference, self.loader, self.test = reference, loader, test
        self.method, self.align_on_test, self.memory = method, align_on_test, memory
        self.progress = progress or (lambda batches, text: batches)
        self.trained, self.layers = reference.networks[0], reference.layers[0]
        self.example = make_example(self.trained, loader)
        self.widths = checked_widths(widths, self.layers)
        self.calls = call_order(self.trained, self.example)
        self._check_coverage()
        self.covariances = [WeightCovariance.fit(reference.aligned_weights(k)) for k in range(len(self.layers) - 1)]

    @cached_property
    def trained_accuracy(self) -> Accuracy:
        """The trained network's on the test set."""
        device = device_of(self.trained)
        with evaluating(self.trained):
            return _accuracy(0, ((self.trained(first_images(batch).to(device)), batch[1]) for batch in self.test))

    def sample(self, seed: int = 0, report: Callable[[Accuracy], None] | None = None) -> RainbowSample:
        """A new network; the same one for the same seed. `report` is told the accuracy after every layer, from 0 on."""
        network = resize(self.trained, self.layers, self.widths, self.example, self.calls)
        result = RainbowSample(network)

        def note(accuracy):
            result.accuracies.append(accuracy)
            if report is not None:
                report(accuracy)

        with evaluating(network, *self.reference.networks):
            _Construction(self, network, seed, result, note).run()
        return result

    def _check_coverage(self):
        """No layer may stay in the old space: every weight called after the first layer must be one we can rotate."""
        called = [name for name, _ in self.calls]
        first = called.index(self.layers[0].name)
        analysed = {layer.name for layer in self.layers}
        for name, skipped in inspect(self.trained, self.example).skipped.items():
            owner = name if name in called else name.rpartition(".")[0]
            if owner in called and called.index(owner) > first and not skipped.harmless:
                raise RainbowError(f"{name} cannot be sampled: {skipped.reason}")
        left_out = [layer.name for layer in weight_layers(self.trained, self.example) if layer.name not in analysed]
        if left_out:
            raise RainbowError(f"all weight layers must be sampled together, but {left_out[0]} is left out")


class Activations:
    """The values of several networks' programs over one data set, kept at the furthest position that fits the memory.

    The networks have the same steps.
    """

    def __init__(
        self, programs: Sequence[Program], loader: Iterable, memory: int, progress: Callable[[Iterable, str], Iterable]
    ):
        self.programs, self.loader, self.memory, self.progress = list(programs), loader, memory, progress
        self.device = device_of(programs[0].network)
        self.position, self.kept, self.images = 0, [], None

    def at(self, position: int, text: str, all_networks: bool = True) -> Iterator[tuple[list[dict], Tensor | None]]:
        """For each batch, the values live at a position of every network (or the last one only), and the labels."""
        start, keep, kept = self.position, self._furthest(position), []
        batches = self.kept if start else self.loader
        for index, batch in enumerate(self.progress(batches, text)):
            if start:
                envs, labels = batch
                batches[index] = None
            else:
                images = first_images(batch).to(self.device, non_blocking=True)
                labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
                envs = [{INPUT: images}] * len(self.programs)
            if keep > start:
                envs = [program.run(env, start, keep) for program, env in zip(self.programs, envs)]
            if keep:
                kept.append((envs, labels))
            wanted = list(zip(self.programs, envs))[0 if all_networks else -1 :]
            yield [program.run(env, keep, position) for program, env in wanted], labels
        self.position, self.kept = keep, kept

    def _furthest(self, position):
        """The furthest position up to the one given whose values fit; the present one if none does."""
        if self.images is None:
            self.images = _count_images(self.loader)
        for candidate in range(position, self.position, -1):
            if self.images * sum(program.bytes_at(candidate) for program in self.programs) <= self.memory:
                return candidate
        return self.position


def _count_images(loader):
    data = getattr(loader, "dataset", None)
    if data is not None and hasattr(data, "__len__"):
        return len(data)
    first = next(iter(loader), None)
    if first is None:
        raise RainbowError("the data is empty: there is nothing to align on")
    if hasattr(loader, "__len__"):
        return len(loader) * len(first_images(first))
    return sum(len(first_images(batch)) for batch in loader)


def _memory(given, device):
    """Bytes for activations: those given, else half of a GPU's free memory, or a quarter of the processor's."""
    if given is not None:
        return given
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return MOST_MEMORY // 4
    return min(free // 4, MOST_MEMORY)


class _Construction:
    """One rainbow network in the making."""

    def __init__(self, sampler, network, seed, result, note):
        self.sampler, self.network, self.seed, self.result, self.note = sampler, network, seed, result, note
        self.reference = sampler.reference
        modules = dict(network.named_modules())
        self.calls = [(name, modules[name]) for name, _ in sampler.calls]
        self.layers = weight_layers(network, sampler.example)
        self.program = Program(network, sampler.example)
        self.originals = [Program(trained, sampler.example) for trained in self.reference.networks]
        self._check_same_steps()
        self.rotations: dict[object, Tensor] = {}  # of values, from the first trained network to the new one
        self.alignments: dict[object, Tensor] = {}  # of the layers' inputs, from the reference to the new network
        self.touched = self._touched()
        self._open_data()

    def run(self):
        owned = neuron_parameters(self.sampler.calls, self.sampler.layers)
        position = {layer.module: k for k, layer in enumerate(self.layers)}
        started = False
        for index, (_, module) in enumerate(self.calls):
            if module in position:
                k = position[module]
                self._set_layer(k, owned[k])
                started = True
            elif started and Norm.find(module) and not self._leads_to_layer(index):
                self._calibrate(module)
        self.result.alignments = [self.alignments[self._key(layer)] for layer in self.layers]
        if self.sampler.test is not None:
            batches = self.testing.at(self.program.end, "accuracy")
            scores = ((env[self.program.output], labels) for (env,), labels in batches)
            self.note(_accuracy(len(self.layers) - 1, scores))

    # ---- what is known of the two networks

    def _open_data(self):
        sampler, device = self.sampler, device_of(self.network)
        memory = _memory(sampler.memory, device)
        everything = [*self.originals, self.program]
        self.statistics = self.aligning = Activations(everything, sampler.loader, memory // 4 * 3, sampler.progress)
        if sampler.test is not None:
            self.testing = Activations([self.program], sampler.test, memory // 4, sampler.progress)
        if sampler.align_on_test:
            self.statistics = Activations([self.program], sampler.loader, memory // 4, sampler.progress)
            self.aligning = Activations(everything, sampler.test, memory // 2, sampler.progress)

    def _check_same_steps(self):
        steps = [step.name for step in self.program.steps]
        for program in self.originals:
            if [step.name for step in program.steps] != steps:
                raise RainbowError("the networks of a set must have the same architecture to be sampled from")

    def _touched(self):
        """The names of the values that depend on a sampled layer."""
        touched, first = set(), self.program.place(self.layers[0].module)
        for position, step in enumerate(self.program.steps):
            if position == first or touched & set(step.inputs):
                touched.add(step.name)
        return touched

    def _is_a_value(self, module):
        """Whether a module's input is a value of the program, rather than made inside a step."""
        return self.program.step_of(module).holder is module

    def _key(self, layer):
        """What names a layer's input: the value that it is, or the layer itself where it runs inside a step."""
        return self.program.step_of(layer.module).inputs[0] if self._is_a_value(layer.module) else layer.name

    def _same_input(self, k):
        """Whether a layer's input is the same fixed function of the images in both networks."""
        module = self.layers[k].module
        return k == 0 or self._is_a_value(module) and self.program.step_of(module).inputs[0] not in self.touched

    def _leads_to_layer(self, index):
        """Whether a normalisation's output is the next layer's input, so that one pass serves both (`_align`)."""
        if index + 1 == len(self.calls) or self.sampler.align_on_test:
            return False
        norm, layer = self.calls[index][1], self.calls[index + 1][1]
        return any(layer is known.module for known in self.layers) and self.program.leads_to(norm, layer)

    def _norm_before(self, k):
        """The normalisation that leads to layer k, and is not set yet; None if there is none."""
        modules = [module for _, module in self.calls]
        index = modules.index(self.layers[k].module) - 1
        found = index >= 0 and Norm.find(modules[index]) and self._leads_to_layer(index)
        return modules[index] if found and Norm.of(modules[index]).statistics else None

    # ---- the steps of the construction

    def _set_layer(self, k, owned):
        layer, key = self.layers[k], self._key(self.layers[k])
        if self._same_input(k):
            size, device = self.sampler.layers[k].channels, accumulation_device(device_of(self.network))
            self.alignments[key] = torch.eye(size, dtype=torch.float64, device=device)
        self._align(k)
        self._measure(k)
        A = self.alignments[key]
        if k == len(self.layers) - 1:
            layer.set(transport(sum(self.reference.aligned_weights(k)) / len(self.reference.networks), A))
            return
        generator = torch.Generator().manual_seed(_seed_of(self.seed, k))
        rows = draw_rows(self.sampler.covariances[k], layer.neurons, self.sampler.method, generator)
        layer.set(transport(rows.to(A.device), A))
        self._draw_neurons(k, owned, generator)

    def _draw_neurons(self, k, names, generator):
        """What neurons have beside weights: that of trained neurons, drawn with replacement."""
        counts = [layers[k].neurons for layers in self.reference.layers]
        chosen = draw_neurons(sum(counts), self.layers[k].neurons, generator)
        for name in names:
            parts = [
                trained.get_parameter(name).detach().unflatten(0, (count, -1))
                for trained, count in zip(self.reference.networks, counts)
            ]
            pool = torch.cat(parts)  # (ΣN, m, ...)
            self.network.get_parameter(name).copy_(pool[chosen.to(pool.device)].flatten(0, 1))

    def _calibrate(self, norm):
        """Gives a normalisation the mean and variance of its input over the training set."""
        step, position = self.program.step_of(norm), self.program.place(norm)
        if self._is_a_value(norm) and step.inputs[0] not in self.touched or Norm.of(norm).statistics is None:
            return
        sums = ChannelSums()
        for envs, _ in self.statistics.at(position, "statistics", all_networks=False):
            sums.add(step.samples_of(norm, envs[-1], None))
        Norm.of(norm).set(sums.mean, sums.var, sums.count)

    def _align(self, k):
        """Aligns a layer's input, and where accuracies are asked for what goes past it: one pass over the data."""
        layer, key = self.layers[k], self._key(self.layers[k])
        others, cross = self._others(k), None
        if key not in self.alignments:
            cross = _CrossCovariance(self, k, self._norm_before(k))
        if not others and cross is None:
            return
        sums = {name: ProductSum(complex_values=False) for name in others}
        position = self.program.place(layer.module) if cross is None else cross.position
        for envs, _ in self.aligning.at(position, f"layer {k + 1}"):
            if cross is not None:
                cross.add(envs)
            for name in others:
                sums[name].add(*(Samples.of(channel_samples(env[name])) for env in (envs[0], envs[-1])))
        if cross is not None:
            A = self.alignments[key] = align(cross.finish(), layer.is_complex)
            self.rotations[key] = self.reference.alignments[0][k].to(A) @ A
        for name, product in sums.items():
            self.rotations[name] = align(product.total())

    def _others(self, k):
        """The values beside layer k's input that go on from there, changed and not yet aligned."""
        module = self.layers[k].module
        if self.sampler.test is None or not self._is_a_value(module) or k == len(self.layers) - 1:
            return []
        return [
            name
            for name in self.program.live(self.program.place(module))
            if name in self.touched and name != self._key(self.layers[k]) and name not in self.rotations
        ]

    def _measure(self, k):
        """The accuracy before layer k is drawn: trained layers from k on, aligned to the new network before them."""
        module = self.layers[k].module
        if self.sampler.test is None or k == len(self.layers) - 1:
            return
        if k == 0:
            self.note(self.sampler.trained_accuracy)
        elif self.program.step_of(module).resumes(module):
            batches = self.testing.at(self.program.place(module), "accuracy")
            self.note(_accuracy(k, ((self._mixed(k, env), labels) for (env,), labels in batches)))

    def _mixed(self, k, env):
        """The scores of a network that is the new one before layer k and the trained one from there on."""
        layer, key = self.layers[k], self._key(self.layers[k])
        x = self.program.step_of(layer.module).input_of(layer.module, env)
        if key in self.rotations:
            x = layer.rotate(x, self.rotations[key].T)  # W (A φ) for a weight W: no conjugate
        env = {name: x if name == key else self._rotated(name, value) for name, value in env.items()}
        return self.originals[0].finish(self.sampler.layers[k].module, x, env)

    def _rotated(self, name, value):
        """A value of the new network in the space of the first trained one."""
        if name not in self.rotations:
            return value
        back = self.rotations[name].T.to(device=value.device, dtype=value.dtype)
        return torch.tensordot(value, back, dims=([1], [0])).movedim(-1, 1) if value.ndim > 3 else value @ back


def _accuracy(layer, batches):
    """Top-1 and top-5 accuracy of (scores, labels)."""
    right, total = torch.zeros(2, dtype=torch.int64), 0
    for scores, labels in batches:
        if labels is None:
            raise RainbowError("accuracies need a test set of (images, labels)")
        best = scores.topk(min(5, scores.shape[1]), 1).indices == labels.to(scores.device)[:, None]
        right += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        total += len(labels)
    return Accuracy(layer, *(100 * right / total).tolist())


class _CrossCovariance:
    """E[φ_ref φ_new^H] at layer k, from inputs before the normalisation that leads to it, if any.

    Normalisations are affine, so that products before and after them are a matter of means: f -> (f - m) s + t.
    """

    def __init__(self, construction, k, norm):
        self.construction, self.k, self.norm = construction, k, norm
        self.layer = construction.layers[k]
        self.module = self.layer.module if norm is None else norm
        self.position = construction.program.place(self.module)
        self.originals = [
            (program, layers[k]) for program, layers in zip(construction.originals, construction.reference.layers)
        ]
        self.products = [ProductSum(self.layer.is_complex) for _ in self.originals]
        self.sums = [ChannelSums() for _ in range(len(self.originals) + 1)]  # the last is the new network's
        self.count = 0

    def add(self, envs):
        """A batch: the values live at `position` of the trained networks, then of the new one."""
        step, is_layer = self.construction.program.steps[self.position], self.norm is None
        own = step.samples_of(self.module, envs[-1], self.layer if is_layer else None)
        self.count += len(own)
        for index, (program, layer) in enumerate(self.originals):
            trained = program.steps[self.position].samples_of(
                self._counterpart(program, layer), envs[index], layer if is_layer else None
            )
            self.products[index].add(trained, own)
            if self.norm is not None:
                self.sums[index].add(trained)
        if self.norm is not None:
            self.sums[-1].add(own)

    def finish(self):
        """E[φ_ref φ_new^H]; sets the new network's normalisation. Warns where there are too few samples."""
        K = [product.total() / self.count for product in self.products]
        if self.count < max(K[0].shape):
            warnings.warn(
                f"layer {self.layer.name}: {self.count} samples for {max(K[0].shape)} channels do not "
                "determine an alignment: give more images",
                stacklevel=2,
            )
        if self.norm is not None:
            own, sums = Norm.of(self.norm), self.sums[-1]
            own.set(sums.mean, sums.var, sums.count)
            for index, (program, layer) in enumerate(self.originals):
                theirs = Norm.of(self._counterpart(program, layer)).affine()
                K[index] = normalized_product(K[index], self.sums[index].mean, theirs, sums.mean, own.affine())
        alignments = [each[self.k].to(K[0].device) for each in self.construction.reference.alignments]
        return sum(
            A.mH.to(torch.promote_types(A.dtype, each.dtype)) @ each.to(torch.promote_types(A.dtype, each.dtype))
            for A, each in zip(alignments, K)
        ) / len(K)

    def _counterpart(self, program, layer):
        """The trained network's module in place of `module`."""
        if self.norm is None:
            return layer.module
        name = next(name for name, module in self.construction.calls if module is self.norm)
        return program.network.get_submodule(name)


def _seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
