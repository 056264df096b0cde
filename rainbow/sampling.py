"""Rainbow networks: networks whose weights are drawn layer by layer from a trained network's covariances (section 4).

With Ĉ_j the covariance of the trained weights of layer j, and A_j the alignment of the trained network's activations
φ_{j-1} to those of the new network, whose layers before j are drawn already, layer j of the new network is

    W'_j = G Ĉ_j^{1/2} A_j,      G white (N_j', D_j).

A_1 is the identity. Between layers the new network's normalisations (`Std`, batch norms) take the mean and variance of
their inputs over the training set. The last layer is the trained one, rotated: W_{J+1} A_{J+1}. A neuron's other
parameters (a bias, the affine map of a batch norm, a threshold) are those of a trained neuron drawn at random.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rainbow.activations import Activations, memory_for
from rainbow.alignment import MeanNetwork, align, transport, warn_of_few_samples
from rainbow.covariance import WeightCovariance
from rainbow.errors import RainbowError
from rainbow.layers import rotate
from rainbow.network import Network
from rainbow.norms import Norm, normalized_product
from rainbow.precision import accumulation_device, rounding
from rainbow.running import check_scores, device_of, evaluating, first_images, labels_of, output_of
from rainbow.samples import ChannelSums, ProductSum, Samples
from rainbow.widths import checked_widths, neuron_parameters, resize

METHODS = ("gaussian", "orthogonal", "white")
Draw = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy with layers 1..`layer` sampled and the others trained and aligned; top-1 and top-5 in percent."""

    layer: int
    acc1: float
    acc5: float


@dataclass
class RainbowSample:
    """A sampled network, and its accuracy after every layer."""

    network: nn.Module
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


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done at one layer, the same for every sample. Modules and values go by name.

    key: what the alignment belongs to, the value that is the layer's input, or the layer if that is made inside a step;
    known: the input is the same function of the images in both networks; norm: the normalisation that leads to the
    layer and is set along with its alignment; norms: those before it that are set by themselves; around: values that
    go around the layer and are aligned when accuracies are measured; measured: whether one is, before the layer;
    owned: the other parameters of its neurons.
    """

    k: int
    name: str
    key: str
    known: bool
    norm: str | None
    norms: list[str]
    around: list[str]
    measured: bool
    owned: list[str]


class RainbowSampler:
    """Samples rainbow networks of a trained network, or of a set of them through their mean network."""

    def __init__(
        self,
        reference: MeanNetwork,
        loader: Iterable,
        *,
        test: Iterable | None = None,
        method: str | Draw = "gaussian",
        widths: Sequence[int] | None = None,
        align_on_test: bool = False,
        memory: int | None = None,
        progress: Callable[[Iterable, str], Iterable] | None = None,
    ):
        """reference: a `MeanNetwork`, of one network or more, of the same architecture. loader, test: (images, labels)
        of the training and test set, always in the same order; accuracies are of the test set, if there is one.
        method: "gaussian", "orthogonal", "white", or a function that draws: (k, N, generator) -> rows (N, D) in the
        reference's space and the trained neurons (N,) int64 whose other parameters they take. widths: N_j of the new
        network's layers but the last (default: the trained ones). align_on_test: the alignments A_j are those of the
        test set. memory: bytes of activations that may be kept (default: a part of what is free). progress: wraps each
        pass over the data, an iterable that comes with a text.

        Raises RainbowError for what cannot be sampled: a layer whose weights the analysis cannot treat or that is
        called more than once, widths that do not fit, an unknown method.
        """
        if method not in METHODS and not callable(method):
            raise RainbowError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
        if align_on_test and test is None:
            raise RainbowError("alignment on the test set needs a test set")
        self.reference, self.loader, self.test = reference, loader, test
        self.method, self.align_on_test, self.memory = method, align_on_test, memory
        self.progress = progress or (lambda batches, text: batches)
        self.network, self.trained, self.layers = reference.analysed[0], reference.networks[0], reference.layers[0]
        _check_coverage(self.network, self.layers)
        self.widths = checked_widths(widths, self.layers)

        self.plan, self.norms_at_the_end = _plan(self.network, test is not None, align_on_test)
        names = [[step.name for step in network.program.steps] for network in reference.analysed]
        if any(each != names[0] for each in names):
            raise RainbowError("the networks of a set must have the same architecture to be sampled from")

    @cached_property
    def trained_accuracy(self) -> Accuracy:
        """The trained network's on the test set. Raises RainbowError without one."""
        if self.test is None:
            raise RainbowError("accuracies need a test set of (images, labels)")
        device = device_of(self.trained)
        with evaluating(self.trained):
            run = ((self.trained(first_images(batch).to(device)), labels_of(batch)) for batch in self.test)
            return accuracy_of(0, run)

    def sample(self, seed: int = 0, report: Callable[[Accuracy], None] | None = None) -> RainbowSample:
        """A new network; the same one for the same seed. `report` is told the accuracy after every layer, from 0 on."""
        new = self.network.rebind(resize(self.network, self.widths))
        with evaluating(new.module, *self.reference.networks):
            return _Sampling(self, new, report).run(seed)

    @property
    def covariances(self) -> list[WeightCovariance]:
        """Ĉ_j of every layer but the last."""
        return [self.reference.covariance(k) for k in range(len(self.layers) - 1)]

    def draw(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of weights of layer k in the reference's space, and trained neurons. # (N', D), (N',)"""
        if callable(self.method):
            return self.method(k, self.widths[k], generator)
        rows = draw_rows(self.reference.covariance(k), self.widths[k], self.method, generator)
        count = sum(layers[k].neurons for layers in self.reference.layers)
        return rows, torch.randint(count, (self.widths[k],), generator=generator)


def _check_coverage(network: Network, layers):
    """No layer may stay in the old space: every weight called after the first layer must be one we can rotate."""
    if network.example is None:
        raise RainbowError("the mean network was fitted without images: give it those that it is sampled on")
    names = [layer.name for layer in layers]
    calls = {name: position for position, name in enumerate(network.calls)}
    for name, reason in network.unsampled.items():
        raise RainbowError(f"{name} cannot be sampled: {reason}")
    for name, skipped in network.skipped.items():
        owner = name if name in calls else name.rpartition(".")[0]
        late = name in network.functional or calls.get(owner, -1) > calls[names[0]]
        if late and not skipped.harmless:
            raise RainbowError(f"{name} cannot be sampled: {skipped.reason}")
    left_out = [layer.name for layer in network.layers if layer.name not in names]
    if left_out:
        raise RainbowError(f"all weight layers must be sampled together, but {left_out[0]} is left out")
    if names != [layer.name for layer in network.layers]:
        raise RainbowError(f"layers must be in forward order to be sampled, not {' '.join(names)}")
    owned = {name.rpartition(".")[0] for each in neuron_parameters(network) for name in each}
    for name, count in network.repeated.items():
        if name in names or name in owned or Norm.find(network.module.get_submodule(name)):
            raise RainbowError(f"{name} cannot be sampled: it is called {count} times in a forward pass")


def _plan(network: Network, test: bool, align_on_test: bool) -> tuple[list[LayerPlan], list[str]]:
    """What is to be done at every layer, and the normalisations to be set after the last."""
    program, touched = network.program, _touched(network)
    rotated: set[str] = set()
    norms, plans = _norms_after_layers(network, touched), []
    for k, (layer, owned) in enumerate(zip(network.layers, neuron_parameters(network))):
        step, last = program.step_of(layer.module), k == len(network.layers) - 1
        is_value = step.holder is layer.module
        key = step.inputs[0] if is_value else layer.name
        around: list[str] = []
        if test and is_value and not last:
            around = [n for n in program.live(program.place(layer.module)) if n in touched - rotated - {key}]
        rotated |= {key, *around}
        norm = None
        if norms[k] and not align_on_test:
            before = network.module.get_submodule(norms[k][-1])
            if program.leads_to(before, layer.module) and {*around} <= {*program.live(program.place(before))}:
                norm = norms[k].pop()
        known = k == 0 or is_value and key not in touched
        measured = test and not last and (k == 0 or step.resumes(layer.module))
        plans.append(LayerPlan(k, layer.name, key, known, norm, norms[k], around, measured, owned))
    return plans, norms[-1]


def _touched(network):
    """The names of the values that depend on a sampled layer."""
    first = network.program.place(network.layers[0].module)
    touched: set[str] = set()
    for position, step in enumerate(network.program.steps):
        if position == first or touched & set(step.inputs):
            touched.add(step.name)
    return touched


def _norms_after_layers(network, touched):
    """The normalisations whose inputs change, before every layer and after the last; none before the first."""
    names = {layer.name for layer in network.layers}
    norms: list[list[str]] = [[]]
    for name in network.calls:
        module = network.module.get_submodule(name)
        if name in names:
            norms.append([])
        elif len(norms) > 1 and Norm.find(module) and Norm.of(module).statistics:
            step = network.program.step_of(module)
            if step.holder is not module or step.inputs[0] in touched:
                norms[-1].append(name)
    return norms


class _Sampling:
    """One rainbow network in the making. `programs`: of the trained networks, then of the new one."""

    def __init__(self, sampler, new, report):
        self.sampler, self.new, self.reference, self.report = sampler, new, sampler.reference, report
        self.programs = [*(network.program for network in self.reference.analysed), new.program]
        self.layers = [*self.reference.layers, new.layers]
        self.rotations: dict[str, Tensor] = {}  # of values, from the first trained network to the new one
        self.alignments: dict[str, Tensor] = {}  # of the layers' inputs, from the reference to the new network
        self.result = RainbowSample(new.module)
        self._open_data()

    def run(self, seed):
        """Draws every layer in the space of the reference and turns it into the new network's."""
        for plan, layer in zip(self.sampler.plan, self.new.layers):
            for norm in plan.norms:
                self._calibrate(norm)
            A = self._align(plan)
            self._measure(plan)
            if plan is self.sampler.plan[-1]:
                W = sum(self.reference.aligned_weights(plan.k)) / len(self.reference.networks)
            else:
                generator = torch.Generator().manual_seed(_seed_of(seed, plan.k))
                W, neurons = self.sampler.draw(plan.k, generator)
                self._set_neurons(plan, neurons)
            layer.set(transport(W.to(A.device), A))
            self._forget(plan)
        for norm in self.sampler.norms_at_the_end:
            self._calibrate(norm)
        if self.sampler.test is not None:
            program = self.programs[-1]
            batches = self.testing.at(program.end, "accuracy")
            self._note(accuracy_of(plan.k, ((values[program.output], labels) for (values,), labels in batches)))
        return self.result

    def _open_data(self):
        sampler, new = self.sampler, self.programs[-1:]
        memory, progress = memory_for(device_of(self.new.module), sampler.memory), sampler.progress
        self.statistics = self.aligning = Activations(self.programs, sampler.loader, memory // 4 * 3, progress)
        if sampler.test is not None:
            self.testing = Activations(new, sampler.test, memory // 4, progress)
        if sampler.align_on_test:
            self.statistics = Activations(new, sampler.loader, memory // 4, progress)
            self.aligning = Activations(self.programs, sampler.test, memory // 2, progress)

    def _calibrate(self, name):
        """Gives a normalisation of the new network the mean and variance of its input over the training set."""
        program, norm, sums = self.programs[-1], Norm.of(self.new.module.get_submodule(name)), ChannelSums()
        step = program.step_of(norm.module)
        for (values,), _ in self.statistics.at(program.place(norm.module), "statistics", last_only=True):
            sums.add(step.samples_of(norm.module, values, None))
        norm.set(sums.mean, sums.var, sums.count)

    def _align(self, plan):
        """A_j; and the rotations of what goes around the layer, in the same pass over the data."""
        program, layer = self.programs[-1], self.new.layers[plan.k]
        if plan.known:
            where = accumulation_device(device_of(self.new.module))
            self.alignments[plan.key] = torch.eye(layer.channels, dtype=torch.float64, device=where)
        cross = None if plan.key in self.alignments else _CrossCovariance(self, plan)
        sums = {name: ProductSum(complex_values=False) for name in plan.around}
        if cross is not None or sums:
            module = layer.module if cross is None else cross.modules[-1]
            for values, _ in self.aligning.at(program.place(module), f"layer {plan.k + 1}"):
                if cross is not None:
                    cross.add(values)
                for name, product in sums.items():
                    axis = program.axis_of(name)
                    both = (values[i][name].movedim(axis, -1).flatten(0, -2) for i in (0, -1))
                    product.add(*map(Samples.of, both))
        if cross is not None:
            count, K = cross.count, cross.finish()
            A = self.alignments[plan.key] = align(K, layer.is_complex, rounding(count))
            own = self.reference.alignments[0][plan.k]
            self.rotations[plan.key] = A if own is None else own.to(A) @ A
        self.rotations |= {name: align(product.finish()) for name, product in sums.items()}
        return self.alignments[plan.key]

    def _forget(self, plan):
        """Lets go of what no layer after this one needs: a matrix is as large as the layer's covariance."""
        later = self.sampler.plan[plan.k + 1 :]
        self.alignments = {key: A for key, A in self.alignments.items() if key in {each.key for each in later}}
        if later:
            program = self.programs[-1]
            live = program.live(program.place(self.new.layers[plan.k + 1].module))
            self.rotations = {name: rotation for name, rotation in self.rotations.items() if name in live}

    def _set_neurons(self, plan, chosen):
        """Gives the neurons of a layer the other parameters of the trained neurons chosen."""
        counts = [layers[plan.k].neurons for layers in self.reference.layers]
        for name in plan.owned:
            trained = [network.get_parameter(name).detach() for network in self.reference.networks]
            pool = torch.cat([each.unflatten(0, (count, -1)) for each, count in zip(trained, counts)])  # (ΣN, m, ...)
            self.new.module.get_parameter(name).copy_(pool[chosen.to(pool.device)].flatten(0, 1))

    def _measure(self, plan):
        """The accuracy before a layer is drawn: the trained layers from there on, aligned to the new ones before."""
        if plan.measured and plan.k == 0:
            self._note(self.sampler.trained_accuracy)
        elif plan.measured:
            batches = self.testing.at(self.programs[-1].place(self.new.layers[plan.k].module), "accuracy")
            self._note(accuracy_of(plan.k, ((self._mixed(plan, values), labels) for (values,), labels in batches)))

    def _note(self, accuracy):
        self.result.accuracies.append(accuracy)
        if self.report is not None:
            self.report(accuracy)

    def _mixed(self, plan, values):
        """The scores of a network that is the new one before a layer and the trained one from there on."""
        layer = self.new.layers[plan.k]
        x = self.programs[-1].step_of(layer.module).input_of(layer.module, values)
        turned = dict(values)
        for name in (self.rotations.keys() & values.keys()) - {plan.key}:
            turned[name] = rotate(values[name], self.rotations[name].T, self.programs[0].axis_of(name))
        if plan.key in self.rotations:
            turned[plan.key] = x = layer.rotate(x, self.rotations[plan.key].T)  # W (A φ) for a weight W: no conjugate
        return self.programs[0].finish(self.reference.layers[0][plan.k].module, x, turned)


class _CrossCovariance:
    """E[φ_ref φ_new^H] at a layer; if a normalisation leads to it, from samples of its input, as it is affine."""

    def __init__(self, sampling, plan):
        networks, self.k = [*sampling.reference.analysed, sampling.new], plan.k
        self.layer, self.has_norm = sampling.new.layers[plan.k], plan.norm is not None
        self.modules = [network.module.get_submodule(plan.norm or plan.name) for network in networks]
        self.steps = [network.program.step_of(module) for network, module in zip(networks, self.modules)]
        self.layers = [None if plan.norm else layers[plan.k] for layers in sampling.layers]
        self.alignments = [each[plan.k] for each in sampling.reference.alignments]
        self.products = [ProductSum(self.layer.is_complex) for _ in self.alignments]
        self.sums, self.count = [ChannelSums() for _ in networks], 0

    def add(self, values):
        """A batch: the values of the trained networks, then of the new one."""
        samples = [step.samples_of(*each) for step, *each in zip(self.steps, self.modules, values, self.layers)]
        self.count += len(samples[-1])
        for product, theirs in zip(self.products, samples):
            product.add(theirs, samples[-1])
        if self.has_norm:
            for sums, each in zip(self.sums, samples):
                sums.add(each)

    def finish(self):
        """The mean over the trained networks, aligned to the reference; sets the new network's normalisation."""
        norms, means = [], []
        if self.has_norm:
            norms, means = [Norm.of(module) for module in self.modules], [sums.mean for sums in self.sums]
            norms[-1].set(means[-1], self.sums[-1].var, self.count)
        turned = torch.zeros(())
        for i, A in enumerate(self.alignments):
            K = self.products.pop(0).finish().div_(self.count)
            if not i:
                warn_of_few_samples(self.layer.name, self.count, max(K.shape))
            if self.has_norm:
                K = normalized_product(K, means[i], norms[i].affine(), means[-1], norms[-1].affine())
            if A is not None:
                dtype = torch.promote_types(A.dtype, K.dtype)
                K = A.to(K.device, dtype).mH @ K.to(dtype)
            turned = turned.add_(K) if i else K
        return turned.div_(len(self.alignments))


def accuracy_of(layer: int, batches: Iterable) -> Accuracy:
    """Top-1 and top-5 accuracy of (scores, labels)."""
    right, total = torch.zeros(2, dtype=torch.int64), 0
    for scores, labels in batches:
        scores = output_of(scores)
        check_scores(scores, labels)
        best = scores.topk(min(5, scores.shape[1]), 1).indices == labels.to(scores.device)[:, None]
        right += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        total += len(labels)
    return Accuracy(layer, *(100 * right / total).tolist())


def _seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def warn_of_chance(trained: nn.Module, sampled: nn.Module, data: Iterable) -> None:
    """Warns if a sample has lost nine tenths of what the trained network knows beyond the most frequent class, by the
    first batches of the data."""
    batches, accuracies = list(itertools.islice(data, 8)), []
    for network in (trained, sampled):
        with evaluating(network):
            run = [(network(first_images(each).to(device_of(network))), labels_of(each)) for each in batches]
        try:
            accuracies.append(accuracy_of(0, run).acc1)
        except RainbowError:  # no labels, or outputs of which there is no accuracy
            return
    labels = torch.cat([labels.cpu() for _, labels in run if labels is not None])
    (before, after), chance = accuracies, 100 * (labels == labels.mode().values).double().mean().item()
    if before - chance > 10 and after - chance < 0.1 * (before - chance):
        text = f"the sampled network is near chance: {after:.1f} %, the trained one {before:.1f} %"
        warnings.warn(f"{text}: its neurons are not independent and Gaussian, or too few", stacklevel=3)
