"""Which channels the elements of a value belong to, found from the modules that make it, in a pass of two images.

A weight layer's outputs get labels, one for each of its neurons, and so does what embeddings and recurrent layers
make. Labels follow the values: what moves elements moves labels, what is summed over positions keeps the label of its
channel, and sums of two values (shortcuts) make their labels one. 0 is no label; what has lost its channels has none.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from rainbow.layers import Layer

MOVES = set(
    "view reshape flatten unflatten permute transpose movedim moveaxis swapaxes swapdims t squeeze unsqueeze "
    "contiguous chunk split unbind narrow select index_select roll flip cat concat concatenate stack hstack vstack "
    "expand expand_as repeat tile repeat_interleave unfold fold pad pixel_shuffle pixel_unshuffle channel_shuffle "
    "clone detach view_as reshape_as rot90 tensor_split adjoint broadcast_to __getitem__ T mT H mH".split()
)
REDUCTIONS = set("mean sum amax amin max min median std var norm logsumexp prod adaptive_avg_pool1d".split())
MATRIX_PRODUCTS = set("matmul __matmul__ __rmatmul__ mm bmm".split())
MIXERS = set("einsum tensordot baddbmm addbmm bilinear cumsum cumprod sort argsort gather scatter take".split())
ADDITIONS = set("add radd iadd sub rsub isub maximum minimum where copy lerp".split())
WEIGHTED = set("linear addmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())


MIXES_POSITIONS = "it mixes positions, and its rows do not belong to channels of the layers before"
MIXED = "the channels of its input differ from position to position"


class Channels(TorchFunctionMode):
    """Labels of values while a network runs, `with` it; afterwards which labels are one.

    parameters: the names of the network's parameters, by identity; constants: its parameters and buffers. used: the
    names of the parameters that functions took, with the number of calls of layers before. multiplied: pairs of names
    whose outputs were multiplied with each other, so that their neurons must agree.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self.constants = WeakTensorKeyDictionary(dict.fromkeys([*model.parameters(), *model.buffers()], True))
        self.labels: Any = WeakTensorKeyDictionary()
        self.flat: Any = WeakTensorKeyDictionary()
        self.makers: list[tuple[int, str]] = []
        self.used: dict[str, int] = {}
        self.multiplied: set[tuple[str, str]] = set()
        self.count, self.inside, self.one = 0, 0, Classes()

    def make(self, name: str, value: Tensor, axis: int) -> None:
        """New labels along an axis of a value."""
        size, shape = value.shape[axis], [1] * value.ndim
        shape[axis] = size
        labels = torch.arange(self.count + 1, self.count + 1 + size, dtype=torch.float32)
        self.makers.append((self.count, name))
        self.count += size
        self.labels[value] = labels.view(shape).expand(value.shape)

    def maker(self, label: int) -> str:
        """Who made a label."""
        return next(name for start, name in reversed(self.makers) if start < label)

    def along(self, value: Tensor, axis: int) -> Tensor | str | None:
        """The labels along an axis; None if there are none; what is wrong if positions have other ones."""
        labels = self.labels.get(value)
        if labels is None or not labels.any():
            return None
        labels = self.one.of(labels)
        others = [each for each in range(labels.ndim) if each != axis % labels.ndim]
        found = _collapsed(labels, others) if others else labels
        if found is not None:
            return found
        if _collapsed(labels, [axis % labels.ndim]) is not None:
            return MIXES_POSITIONS
        return MIXED

    def axis(self, value: Any) -> int | None:
        """The one axis that the labels of a value vary along, if there is one."""
        labels = self.labels.get(value) if isinstance(value, Tensor) else None
        if labels is None:
            return None
        axes = [axis for axis in range(labels.ndim) if _collapsed(labels, [axis]) is None]
        return axes[0] if len(axes) == 1 else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        given = list(_tensors([*args, *kwargs.values()]))
        for tensor in given:
            if id(tensor) in self.parameters:
                self.used.setdefault(self.parameters[id(tensor)], len(self.makers))
        outs = [each for each in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(each, Tensor)]
        if name == "__setitem__":
            self._set_item(*args)
        elif outs and given:
            try:
                self._follow(func, name, args, kwargs, given, outs)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError):  # a function may be anything
                self._label(outs, [])
        return out

    def _follow(self, func, name, args, kwargs, given, outs):
        if all(tensor in self.constants for tensor in given):
            self.constants.update(dict.fromkeys(outs, True))
            return
        weights = [tensor for tensor in given if tensor in self.constants and tensor.ndim > 1]
        if name in WEIGHTED and self.inside:
            return
        if name in WEIGHTED or name in MATRIX_PRODUCTS and weights:
            axis = 1 if name.startswith("conv") else -1
            self.make(next((self.parameters[id(w)] for w in weights if id(w) in self.parameters), name), outs[0], axis)
            return
        labelled = [tensor for tensor in given if tensor in self.labels]
        self._note_flattening(given[0], outs[0])
        if not labelled:
            return
        if name in MOVES:
            results = _moved(self, func, args, kwargs)
        elif name in MATRIX_PRODUCTS:
            results = [_product(self, given[0], given[1], outs[0])]
        elif name == "scaled_dot_product_attention":
            self._tie(self._last(given[0]), self._last(given[1]))
            results = [self._rows_of(given[2], outs[0])]
        elif name in MIXERS or name.startswith("fft"):
            makers = [self.maker(int(self.labels[t].max())) for t in labelled]
            self.multiplied |= {(a, b) for a in makers for b in makers if a != b}
            results = []
        else:
            fits = name in REDUCTIONS or outs[0].ndim == max(tensor.ndim for tensor in given)
            found = [self.labels[tensor] for tensor in labelled]
            results = [_elementwise(self, name, found, args, kwargs, outs[0]) if fits else None]
        self._label(outs, results)

    def _label(self, outs, results):
        for out, labels in itertools.zip_longest(outs, results):
            if labels is None or labels.shape != out.shape or not labels.any():
                self.labels.pop(out, None)
            else:
                self.labels[out] = labels

    def _note_flattening(self, source, out):
        """Remembers the shape of a value that is flattened."""
        shape = self.flat.get(source, source.shape[1:] if out.ndim == 2 < source.ndim else None)
        if shape is not None and out.ndim == 2 and out.shape[1] == math.prod(shape):
            self.flat[out] = tuple(shape)

    def _set_item(self, target, index, value):
        if isinstance(value, Tensor) and value in self.labels:
            labels = self.labels.get(target)
            labels = torch.zeros(target.shape) if labels is None else labels.clone()
            labels[index] = self.labels[value]
            self.labels[target] = labels

    def _tie(self, a, b):
        """Notes that channels are multiplied with each other."""
        if a is None or b is None:
            return
        for x, y in {(int(x), int(y)) for x, y in ((a.max(), b.max()), (a.min(), b.min())) if x and y and x != y}:
            self.multiplied.add((self.maker(x), self.maker(y)))

    def _last(self, value):
        labels = self.labels.get(value)
        return None if labels is None or _collapsed(labels, [labels.ndim - 1]) is not None else labels

    def _rows_of(self, value, out):
        """The labels of sums over the rows of a value (..., k, m). # (..., n, m)"""
        return _summed(self.labels.get(value), out.shape)


def _moved(channels, func, args, kwargs):
    """The labels of what a function makes that only moves elements."""

    def swap(x):
        if isinstance(x, (list, tuple)):
            return type(x)(map(swap, x)) if type(x) in (list, tuple) else x
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point() and not x.is_complex():
            return x.cpu()  # an index; labels are kept there
        labels = channels.labels.get(x)
        return torch.zeros(x.shape) if labels is None else labels.contiguous()

    moved = func(*swap(args), **{key: swap(value) for key, value in kwargs.items()})
    return list(moved) if isinstance(moved, (tuple, list)) else [moved]


def _elementwise(channels, name, labels, args, kwargs, out):
    """The labels of what a function makes of elements at the same place, or of positions next to it."""
    if name in REDUCTIONS and out.ndim < labels[0].ndim:
        return _reduced(name, labels[0], args, kwargs)
    if name == "glu":
        labels = list(labels[0].chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1)))
    result = _resized(labels[0], out.shape)
    for other in labels[1:]:
        other = _resized(other, out.shape)
        result = (
            None
            if result is None or other is None
            else _joined(channels, result, other, name.strip("_") not in ADDITIONS)
        )
    return result


def _joined(channels, a, b, product):
    """The labels of what is made from elements of a and b."""
    a, b = channels.one.of(a), channels.one.of(b)
    thin = torch.broadcast_tensors(*_thin(a, b))
    codes = (thin[0].double() * (channels.count + 1) + thin[1]).unique().long()
    pairs = torch.stack([codes // (channels.count + 1), codes % (channels.count + 1)])
    pairs = pairs[:, (pairs > 0).all(0)]
    ones, others = (row.unique().numel() for row in pairs)
    count = pairs.shape[1]
    if ones == others == count:
        if product and count:
            channels._tie(*pairs)
        channels.one.join(*pairs.tolist())
    elif count == others:  # one label of a for each of b
        a, b = b, a
    elif count != ones:
        return None
    return channels.one.of(torch.where(a == 0, b, a))


def _product(channels, a, b, out):
    """The labels of a matrix product: sums over tokens keep the channels, sums over channels tie the factors'."""
    if min(a.ndim, b.ndim) < 2:
        return None
    columns = channels.labels.get(a)
    columns = None if columns is None else columns.mT  # (..., k, n)
    rows = channels.labels.get(b)
    if columns is not None and rows is not None:
        inner = [None if _collapsed(each, [each.ndim - 2]) is not None else each for each in (columns, rows)]
        channels._tie(*inner)
    right, left = _summed(rows, out.shape), _summed(columns, out.mT.shape)
    found = [each for each in (right, None if left is None else left.mT) if each is not None]
    return found[0] if len(found) == 1 else None


@contextlib.contextmanager
def following(channels: Channels, names: Mapping[nn.Module, str]) -> Iterator[None]:
    """Within: the outputs of the network's modules are labelled, and what functions make of them."""

    def before(module, args):
        channels.inside += Layer.find(module) is not None

    def after(module, args, out):
        if Layer.find(module) is not None:
            channels.inside -= 1
            _label_layer(channels, names[module], module, args[0], out)
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.Embedding)):
            channels.make(names[module], out[0] if isinstance(out, tuple) else out, -1)

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    try:
        with channels:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _label_layer(channels, name, module, x, out):
    """New labels for what a layer makes, or those of its input if it keeps the channels apart."""
    adapter: Any = Layer.find(module)
    refusal, groups = adapter.refusal(module), getattr(module, "groups", 1)
    keeps = refusal is not None and refusal.harmless or groups > 1 and x.shape[1] == groups == out.shape[1]
    if keeps or channels.along(x, adapter.channel_axis) is MIXES_POSITIONS:
        labels = channels.labels.get(x)
        labels = None if labels is None else _resized(labels, out.shape)
        if labels is not None:
            channels.labels[out] = labels
    else:
        channels.make(name, out, adapter.channel_axis)


class Classes:
    """Which numbers are one."""

    def __init__(self):
        self.parents: dict[int, int] = {}

    def find(self, x: int) -> int:
        while x in self.parents:
            x = self.parents[x]
        return x

    def join(self, a: Iterable[int], b: Iterable[int]) -> None:
        for x, y in zip(a, b):
            x, y = self.find(x), self.find(y)
            if x != y:
                self.parents[max(x, y)] = min(x, y)

    def of(self, labels: Tensor) -> Tensor:
        """The smallest number that is one with each."""
        (thin,) = _thin(labels)
        numbers, places = thin.unique(return_inverse=True)
        known = torch.tensor([self.find(int(x)) for x in numbers.tolist()], dtype=labels.dtype)
        return known[places].view(thin.shape).expand(labels.shape)


def layout(labels: Tensor) -> tuple[int, bool] | None:
    """The number of channels among the entries of an input, and whether they come last: (C, K) or (K, C) flattened.

    None if they lie in no such order. labels: (D,), some the same.
    """
    channels = labels.unique().numel()
    if (labels == 0).any() or len(labels) == channels:
        return len(labels), False
    if len(labels) % channels:
        return None
    first, last = labels.view(channels, -1), labels.view(-1, channels)
    if (first == first[:, :1]).all():
        return channels, False
    return (channels, True) if (last == last[:1]).all() else None


def _collapsed(labels: Tensor, axes: Any, keepdim: bool = False) -> Tensor | None:
    """The labels without some axes, along which they must be constant or 0; None if they are not."""
    axes = [axes % labels.ndim] if isinstance(axes, int) else [axis % labels.ndim for axis in axes]
    kept = [1 if axis in axes else size for axis, size in enumerate(labels.shape)]
    (thin,) = _thin(labels)
    high = thin.amax(axes, True)
    low = torch.where(thin == 0, math.inf, thin).amin(axes, True)
    if not ((low == high) | (high == 0)).all():
        return None
    high = high.expand(kept)
    return high if keepdim else high.squeeze(tuple(axes))


def _thin(*labels):
    """The same with length 1 along axes that all of them are expanded along."""
    axes = [axis for axis in range(labels[0].ndim) if all(each.stride(axis) == 0 for each in labels)]
    return [each[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(each.ndim))] for each in labels]


def _resized(labels, shape):
    """Labels for a value of another shape: broadcast, or of other lengths along axes that they are constant along."""
    if labels.ndim > len(shape):
        return None
    labels = labels.view(*[1] * (len(shape) - labels.ndim), *labels.shape)
    axes = [axis for axis in range(len(shape)) if labels.shape[axis] not in (1, shape[axis])]
    found = _collapsed(labels, axes, True) if axes else labels
    return None if found is None else found.expand(shape)


def _reduced(name, labels, args, kwargs):
    """The labels of sums and the like along axes that the call names."""
    axes = kwargs.get("dim", kwargs.get("axis", next((a for a in args[1:] if isinstance(a, (int, tuple, list))), None)))
    return None if axes is None or isinstance(axes, bool) or name == "norm" else _collapsed(labels, axes)


def _summed(labels, shape):
    """The labels of sums over the rows of a value (..., k, m), which must be constant along them. # (..., n, m)"""
    found = None if labels is None else _collapsed(labels, [labels.ndim - 2], True)
    return None if found is None else _resized(found, shape)


def _tensors(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
