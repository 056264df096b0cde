"""The fast path of a block: wavelets, modulus, standardisation, projection and normalisation in one operation.

It computes what the modules of `block.py` compute one after another, for the blocks of the paper, near the cost of the
projection's own matrix products:

- Padding, filtering, subsampling and cropping are one linear map of the image. A Morlet filter is a short sum of
  separable ones, so the map is a product of small matrices along the rows, then along the columns (`WaveletMaps`); for
  small images one dense matrix is cheaper.
- Channels lie last in memory, the parts of complex numbers apart: every step is a matrix product with long rows.
- Images go through in chunks that fit the processor's cache. The backward pass recomputes the complex wavelet
  coefficients where only their modulus was kept.
- Standardisation is folded into the weights of the projection: W diag(r), and a bias.

Inside, a feature map is a real tensor (B, M, N, p·C): p = 1 part, or p = 2 for a complex one, real parts first.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.nonlinearity import NonLinearity
from models.signal import output_size, padding_indices
from models.standardization import EPSILON, count_over_ranks, sum_over_ranks

_RANK_TOLERANCE = 1e-7  # singular values below this part of the largest are lost in float32 anyway
_SEPARABLE_OVERHEAD = 2.5  # measured: what a multiply-add of two small products costs beside one of a dense product
_LARGE_IMAGE = 48  # measured: from this size on, images are cut into windows of as many outputs:
_WINDOWS = (16, 14, 12, 20, 24, 28)
_FEW_CHANNELS = 32  # measured: with fewer, images go through side by side, as channels of one
_CHUNK_BYTES = 4 << 20  # measured: wavelet coefficients of a chunk on a CPU
_GROUP_ROWS = 2048  # measured: with fewer rows, reading the weights dominates the projection
_PRODUCT_ROWS = 16384  # bounds the copies of the features' columns that the weights' gradients need
_SMALL_PRODUCT = 1 << 22  # multiply-adds; measured
_WIDE = 64  # columns; measured
_CHUNK_BYTES_GPU = 1 << 30
_SMALLEST_MODULUS = 1e-18  # below it the modulus has no gradient


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------------------------------


def _convolves(x, multiply_adds):
    """Whether a product runs as a 1×1 convolution: oneDNN's are faster than `torch.mm` on many processors."""
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available() and multiply_adds > _SMALL_PRODUCT


def _times_transposed(x, w, bias, lower):
    """x wᵀ + bias of x (n, D) and w (C, D) -> (n, C), in the type `lower` if it is not None."""
    if lower is not None:
        x, w = x.to(lower), w.to(lower)
        return (x @ w.t()).float().add_(bias)
    if not _convolves(x, x.numel() * len(w)):
        return torch.addmm(bias, x, w.t())
    image = x.contiguous()[None, None].permute(0, 3, 1, 2)  # (1, D, 1, n), channels last
    return F.conv2d(image, w[:, :, None, None], bias)[0, :, 0].t()


def _transposed_times(g, x, lower):
    """gᵀ x of g (n, C) and x (n, D) -> (C, D), in the type `lower` if it is not None."""
    if lower is not None:
        return (g.to(lower).t() @ x.to(lower)).float()
    if not _convolves(x, x.numel() * g.shape[1]):
        return g.t() @ x
    g, x = (matrix.contiguous()[None, None].permute(0, 3, 1, 2) for matrix in (g, x))
    return torch.nn.grad.conv2d_weight(x, (g.shape[1], x.shape[1], 1, 1), g)[:, :, 0, 0]


def _times_batch(matrix, x):
    """A x_i of A (P, K) and x (batch, K, C) -> (batch, P, C)."""
    if x.shape[-1] >= _WIDE and _convolves(x, x.numel() * len(matrix)):
        return F.conv2d(x[:, :, None].contiguous(), matrix[:, :, None, None])[:, :, 0]
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


# ---------------------------------------------------------------------------------------------------------------------
# The wavelet transform as matrices
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Filters computed together: which (φ is number n), and the matrices along the rows, then along the columns."""

    filters: range
    rows: np.ndarray | None  # (M'·R, M); None in a dense transform
    columns: np.ndarray  # (N'·planes, R·N·parts), or (M'·N'·planes, M·N·parts) in a dense transform


@dataclass(frozen=True)
class _Axis:
    """One axis of a transform on the padded, periodic grid: where the outputs lie, what input each place holds."""

    size: int  # of the input
    outputs: np.ndarray  # places
    sources: np.ndarray  # input index at places 0, 1, …

    @classmethod
    def whole(cls, size, subsample):
        """A whole image's axis: padding, filtering, subsampling, cropping."""
        outputs = np.arange(output_size(size, subsample))
        return cls(size, 2 * (outputs + 1) if subsample else outputs + 2, np.array(padding_indices(size)))

    @classmethod
    def window(cls, length, subsample, reach):
        """A window that holds all that `length` neighbouring outputs depend on, filters reaching `reach` samples."""
        step = 2 if subsample else 1
        size = step * (length - 1) + 1 + 2 * reach
        return cls(size, reach + step * np.arange(length), np.arange(size))

    def matrix(self, factor):
        """(M', M) matrix of the convolution with the periodic `factor` (P,)."""
        values = factor[(self.outputs[:, None] - np.arange(len(self.sources))) % len(factor)]  # (M', places)
        matrix = np.zeros((len(self.outputs), self.size), dtype=factor.dtype)
        np.add.at(matrix.T, self.sources, values.T)
        return matrix


def _kernels(bank):
    """Periodic filters in space from their real DFTs: (n + 1, P, Q) -> complex128; φ's imaginary part is 0."""
    return np.fft.ifft2(bank.astype(np.float64))


def _complex_matrix(real, imaginary, parts):
    """Real matrix of a complex filter on `parts` parts of the input.

    Args:
        real, imaginary: (N', R, N) maps of one filter.

    Returns:
        (N', 2, R, N, parts): real and imaginary part of the output from the parts of the input.
    """
    if parts == 1:
        return np.stack([real, imaginary], 1)[..., None]
    return np.stack([np.stack([real, -imaginary], -1), np.stack([imaginary, real], -1)], 1)


def _group_matrix(maps, parts, phi_parts):
    """Stack the maps of a group's filters: [(real, imaginary) (N', R, N)] -> (N'·planes, R·N·parts).

    Rows are ordered by (position, part, filter); `phi_parts` is 1 for a real φ alone in its group.
    """
    stacked = np.stack([_complex_matrix(*pair, parts) for pair in maps], 2)  # (N', 2, filters, R, N, parts)
    stacked = stacked[:, :phi_parts]
    rows = math.prod(stacked.shape[:3])
    return stacked.reshape(rows, -1)


def _mirrored_groups(kernels):
    """Filters that are mirror images of one another along the columns share their row maps: lists of filter numbers."""
    groups = []
    for number, kernel in enumerate(kernels):
        mirrored = np.roll(kernel[:, ::-1], 1, axis=1)
        for group in groups:
            if np.abs(kernels[group[0]] - mirrored).max() < _RANK_TOLERANCE * np.abs(kernel).max():
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def _separable_group(filters, kernels, axes, parts, phi_parts):
    """The group of filters that are sums of the same R separable terms, found by an SVD."""
    planes = np.concatenate([np.concatenate([kernels[f].real.T, kernels[f].imag.T]) for f in filters])  # (2·f·Q, P)
    columns, scales, rows = np.linalg.svd(planes, full_matrices=False)
    rank = max(1, int((scales > _RANK_TOLERANCE * scales[0]).sum()))
    row_maps = np.stack([axes[0].matrix(row) for row in rows[:rank]], 1)  # (M', R, M)
    columns = (columns[:, :rank] * scales[:rank]).reshape(len(filters), 2, kernels.shape[2], rank)
    maps = [[np.stack([axes[1].matrix(part[:, r]) for r in range(rank)], 1) for part in column] for column in columns]
    return _Group(_as_range(filters), row_maps.reshape(-1, axes[0].size), _group_matrix(maps, parts, phi_parts))


def _dense_group(filters, kernels, axes, parts, phi_parts):
    """The group of filters computed by one matrix from all pixels of an image."""
    maps = []
    for f in filters:
        columns = np.stack([axes[1].matrix(row) for row in kernels[f]])  # (P, N', N) complex
        shifts = (axes[0].outputs[:, None] - np.arange(len(axes[0].sources))) % len(columns)
        matrix = np.zeros((len(axes[0].outputs), axes[0].size, *columns.shape[1:]), dtype=complex)
        np.add.at(matrix.swapaxes(0, 1), axes[0].sources, columns[shifts].swapaxes(0, 1))
        flat = matrix.swapaxes(1, 2).reshape(len(axes[0].outputs) * len(axes[1].outputs), 1, -1)  # (M'·N', 1, M·N)
        maps.append((flat.real, flat.imag))
    return _Group(_as_range(filters), None, _group_matrix(maps, parts, phi_parts))


def _as_range(filters):
    """One filter, two, or all in a row, as a range."""
    step = filters[1] - filters[0] if len(filters) > 1 else 1
    return range(filters[0], filters[-1] + 1, step)


def _reach(kernels):
    """How far from the origin the filters reach, in samples, to float32 accuracy."""
    magnitude = np.abs(kernels).max(0)
    offsets = [np.minimum(np.arange(size), size - np.arange(size)) for size in magnitude.shape]
    significant = magnitude > _RANK_TOLERANCE * magnitude.max()
    return int(max(offsets[0][significant.any(1)].max(), offsets[1][significant.any(0)].max()))


@cache
def _plan(bank_key, shape, subsample, parts, phi_parts):
    """How to transform images of `shape` cheaply: outputs to a window's side (or None), axes, groups (φ's first)."""
    kernels = _kernels(bank_key.bank)
    phi = len(kernels) - 1
    window = _window(shape, subsample)
    if window:
        axes = [_Axis.window(window, subsample, _reach(kernels))] * 2
        if axes[0].size > min(kernels.shape[1:]):
            window = None
    if not window:
        axes = [_Axis.whole(size, subsample) for size in shape]
    arguments = (kernels, axes, parts)
    groups = [_separable_group([phi], *arguments, phi_parts)]
    groups += [_separable_group(group, *arguments, 2) for group in _mirrored_groups(kernels[:phi])]
    rows, columns = (len(axis.outputs) for axis in axes)
    separable = sum(group.rows.size * axes[1].size * parts + group.columns.size * rows for group in groups)
    dense = rows * columns * (phi_parts + 2 * phi) * axes[0].size * axes[1].size * parts
    if not window and dense < _SEPARABLE_OVERHEAD * separable:
        groups = [_dense_group([phi], *arguments, phi_parts), _dense_group(range(phi), *arguments, 2)]
    return window, axes, groups


def _window(shape, subsample):
    """Outputs to a side of the windows a large image is cut into; None for a small image."""
    outputs = [output_size(size, subsample) for size in shape]
    if min(shape) < _LARGE_IMAGE:
        return None
    return next((size for size in _WINDOWS if all(output % size == 0 for output in outputs)), None)


class _BankKey:
    """A filter bank as a dictionary key."""

    def __init__(self, bank):
        self.bank = bank
        self._bytes = bank.tobytes()

    def __hash__(self):
        return hash(self._bytes)

    def __eq__(self, other):
        return self._bytes == other._bytes


class WaveletMaps(nn.Module):
    """The wavelet transform and its adjoint on chunks of images (b, M, N, p·C), as matrix products.

    Args:
        bank: (n + 1, P, Q) real DFTs of the filters, φ last.
        shape: (M, N) of the images.
        subsample: whether the output is subsampled by 2.
        parts: 1 for real images, 2 for complex ones.
        phi_parts: parts of φ wanted; 2 also for the zero imaginary part of a real φ.
    """

    def __init__(self, bank, shape, subsample, parts, phi_parts):
        super().__init__()
        window, axes, groups = _plan(_BankKey(bank), shape, subsample, parts, phi_parts)
        self.parts = parts
        self.out_shape = tuple(len(axis.outputs) for axis in axes)
        self.image_shape = tuple(output_size(size, subsample) for size in shape)
        self.windows = None
        if window:
            self.windows = tuple(size // window for size in self.image_shape)
            for name, size in zip(("window_rows", "window_columns"), shape, strict=True):
                self.register_buffer(name, _window_sources(size, subsample, axes[0]), persistent=False)
        self.filters = [group.filters for group in groups]
        self.slices = [slice(0, 1)] + [slice(f.start + 1, f.stop + 1, f.step) for f in self.filters[1:]]
        self.group_parts = [phi_parts] + [2] * (len(groups) - 1)
        for index, group in enumerate(groups):
            self._register(f"rows_{index}", group.rows)
            self._register(f"columns_{index}", group.columns)

    def _register(self, name, matrix):
        forward = None if matrix is None else torch.from_numpy(matrix.astype(np.float32))
        backward = None if matrix is None else forward.t().contiguous()
        self.register_buffer(name, forward, persistent=False)
        self.register_buffer(f"{name}_adjoint", backward, persistent=False)

    def split(self, x):
        """Cut large images (B, M, N, p·C) into overlapping windows (B·windows, m, n, p·C); differentiable."""
        if self.windows is None:
            return x
        high, wide = self.windows
        x = x.index_select(1, self.window_rows).index_select(2, self.window_columns)
        x = x.unflatten(2, (wide, -1)).unflatten(1, (high, -1))  # (B, high, m, wide, n, p·C)
        return x.transpose(2, 3).flatten(0, 2)

    def join(self, y):
        """Put windows' outputs (B·windows, m', n', C) together, (B, M', N', C); differentiable."""
        if self.windows is None:
            return y
        high, wide = self.windows
        y = y.unflatten(0, (-1, high, wide)).transpose(2, 3)  # (B, high, m', wide, n', C)
        return y.flatten(3, 4).flatten(1, 2)

    def planes(self):
        """Number of real planes the transform gives for each channel."""
        return sum(parts * len(filters) for parts, filters in zip(self.group_parts, self.filters, strict=True))

    def forward(self, x):
        """x (b, M, N, p·C) -> for each group z (b·M'·N', parts, filters, C)."""
        b, m, n, pc = x.shape
        c = pc // self.parts
        if b > 1 and c < _FEW_CHANNELS:
            side_by_side = x.view(b, m, n, self.parts, c).permute(1, 2, 3, 0, 4).reshape(1, m, n, -1).contiguous()
            return [
                z.view(-1, *z.shape[1:3], b, c).movedim(3, 0).reshape(-1, *z.shape[1:3], c)
                for z in self._coefficients(side_by_side)
            ]
        return self._coefficients(x)

    def _coefficients(self, x):
        c = x.shape[-1] // self.parts
        coefficients = []
        for index, (parts, filters) in enumerate(zip(self.group_parts, self.filters, strict=True)):
            mapped, columns = self._map_rows(x, index), getattr(self, f"columns_{index}")
            z = _times_batch(columns, mapped)  # (b·M', N'·parts·filters, C)
            coefficients.append(z.view(-1, parts, len(filters), c))
        return coefficients

    def _map_rows(self, x, index):
        """(b, M, N, p·C) -> (b·M', R·N·p, C), or (b, M·N·p, C) in a dense transform."""
        rows, (b, m, n, pc) = getattr(self, f"rows_{index}"), x.shape
        if rows is None:
            return x.view(b, -1, pc // self.parts)
        mapped = torch.bmm(rows.expand(b, -1, -1), x.view(b, m, n * pc))  # (b, M'·R, N·p·C)
        return mapped.view(b * self.out_shape[0], -1, pc // self.parts)

    def adjoint(self, gradients, out):
        """Gradients with respect to each group's output -> the gradient with respect to x, written to `out`."""
        b, m, n, pc = out.shape
        c = pc // self.parts
        if b > 1 and c < _FEW_CHANNELS:
            total = out.new_empty(1, m, n, self.parts * b * c)
            apart = [g.view(b, -1, *g.shape[1:]) for g in gradients]
            self._adjoint([g.movedim(0, 3).reshape(-1, *g.shape[2:4], b * c) for g in apart], total)
            out.view(b, m, n, self.parts, c).copy_(total.view(m, n, self.parts, b, c).permute(3, 0, 1, 2, 4))
        else:
            self._adjoint(gradients, out)

    def _adjoint(self, gradients, out):
        b, m, n, pc = out.shape
        c = pc // self.parts
        for index, gradient in enumerate(gradients):
            columns, rows = getattr(self, f"columns_{index}_adjoint"), getattr(self, f"rows_{index}_adjoint")
            beta = float(index > 0)
            if rows is None:
                total = out.view(b, -1, c)
                torch.baddbmm(total, columns.expand(b, -1, -1), gradient.view(b, -1, c), beta=beta, out=total)
            else:
                batch, total = b * self.out_shape[0], out.view(b, m, n * pc)
                mapped = _times_batch(columns, gradient.view(batch, -1, c))  # (b·M', R·N·p, C)
                torch.baddbmm(total, rows.expand(b, -1, -1), mapped.view(b, -1, n * pc), beta=beta, out=total)


def _window_sources(size, subsample, axis):
    """Input indices of all windows of an axis, one window after another."""
    whole = _Axis.whole(size, subsample)
    starts = whole.outputs[:: len(axis.outputs)] - axis.outputs[0]
    places = (starts[:, None] + np.arange(axis.size)) % len(whole.sources)
    return torch.from_numpy(whole.sources[places].reshape(-1))


# ---------------------------------------------------------------------------------------------------------------------
# The block as one differentiable operation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of every real column of the features, and how many samples they are of."""

    mean: torch.Tensor
    var: torch.Tensor
    count: int = 0


def modulus_features(coefficients, slices, out):
    """[φ, |ψ|] of a chunk: groups (P, parts, filters, C) -> `out` (P, 1 + n, C), each at its slice."""
    out[:, 0] = coefficients[0][:, 0, 0]
    for z, filters in zip(coefficients[1:], slices[1:], strict=True):
        _modulus(z, out[:, filters])


def modulus_gradients(gradient, features, coefficients, slices):
    """Gradients of the coefficients, over `coefficients`, from those of [φ, |ψ|] (over `gradient`)."""
    coefficients[0][:, 0, 0] = gradient[:, 0]
    ratio = gradient.div_(features.clamp_min(_SMALLEST_MODULUS))
    for z, filters in zip(coefficients[1:], slices[1:], strict=True):
        z.mul_(ratio[:, None, filters])
    return coefficients


def skip_features(coefficients, slices, out):
    """[Re z, |z|, Im z] of a chunk, z = [φ, ψ]: groups (P, 2, filters, C) -> `out` (P, 3, 1 + n, C)."""
    for z, filters in zip(coefficients, slices, strict=True):
        out[:, 0::2, filters] = z
        _modulus(z, out[:, 1, filters])


def skip_gradients(gradient, features, slices):
    """Gradients of each group's coefficients from those of [Re z, |z|, Im z]; the coefficients are in `features`."""
    ratio = torch.div(gradient[:, 1], features[:, 1].clamp_min(_SMALLEST_MODULUS))
    return [torch.addcmul(gradient[:, 0::2, f], ratio[:, None, f], features[:, 0::2, f]).contiguous() for f in slices]


def _modulus(z, out):
    squared = torch.mul(z[:, 0], z[:, 0])
    squared.addcmul_(z[:, 1], z[:, 1])
    torch.sqrt(squared, out=out)


class _FusedBlock(torch.autograd.Function):
    """x (B, M, N, p·C), W (C', D) real or complex -> y (B, M', N', q·C') and the features' statistics."""

    @staticmethod
    def forward(ctx, x, weight, plan, statistics, lower):
        keep = any(ctx.needs_input_grad)
        ctx.batch_statistics = statistics is None
        ctx.lower = lower
        if keep or statistics is None:
            features, statistics = plan.compute_features(x, statistics)
        else:
            features = None
        matrices = plan.fold(weight, statistics)
        y, norm = plan.project(x, features, matrices, statistics, lower)
        if keep:
            ctx.plan, ctx.statistics = plan, statistics
            ctx.save_for_backward(x, weight, features, y, norm, *matrices)
        count = torch.tensor(statistics.count)
        ctx.mark_non_differentiable(statistics.mean, statistics.var, count)
        return y, statistics.mean, statistics.var, count

    @staticmethod
    def backward(ctx, gradient, *_statistics):
        x, weight, features, y, norm, *matrices = ctx.saved_tensors
        plan, statistics = ctx.plan, ctx.statistics
        gradient = plan.undo_normalization(gradient, y, norm)
        total = gradient.sum(0)
        products = plan.weight_products(gradient, features, total, matrices, statistics, ctx.lower)
        weight_gradient = plan.unfold(products, weight, statistics) if ctx.needs_input_grad[1] else None
        x_gradient = None
        if ctx.needs_input_grad[0]:
            slope, shift = plan.statistics_gradient(matrices, products, total, statistics, ctx.batch_statistics)
            x_gradient = plan.input_gradient(x, gradient, features, matrices, slope, shift, ctx.lower)
        return x_gradient, weight_gradient, None, None, None


def _cut(whole, size):
    """Cut a slice into slices of at most `size` (at least 1)."""
    size = max(1, size)
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


def _within(inner, outer):
    """A slice counted from the start of another one that holds it."""
    return slice(inner.start - outer.start, inner.stop - outer.start)


class FusedBlock(nn.Module):
    """What a block of the pattern `Fw [rho] [Std] P|Pr|Pc [N]` computes, as one operation. See `fused`."""

    def __init__(self, transform, skip, standardized, normalized, shape, parts, channels):
        super().__init__()
        self.skip, self.standardized, self.normalized, self.channels = skip, standardized, normalized, channels
        bank = transform.bank.cpu().numpy()
        self.maps = WaveletMaps(bank, shape, transform.subsample, parts, phi_parts=2 if skip else 1)
        self.width = channels * transform.bank.shape[0] * (3 if skip else 1)  # real columns of the features
        number = transform.number
        psi = channels + torch.arange(channels * number).view(channels, number)
        columns = torch.cat([torch.arange(channels), psi.t().flatten()])
        self.register_buffer("columns", columns, persistent=False)  # canonical channel of each column
        self.register_buffer("places", torch.argsort(columns), persistent=False)

    # -- from the module's weights and buffers to real columns, and back ------------------------------------------

    def _pieces(self, is_complex):
        """How W becomes real matrices: (matrix, block of rows, block of columns, half of W, part of W, sign).

        y = W z gives q real rows for each channel; the columns are [φ, |ψ|], or [Re z, |z|, Im z] for a W with the
        halves (z, |z|). Real weights of a complex z leave out their zeros: Im y comes from Im z alone.
        """
        if not self.skip:
            return [(0, part, 0, 0, part, 1) for part in range(1 + is_complex)]
        if not is_complex:
            return [(0, 0, 0, 0, 0, 1), (0, 0, 1, 1, 0, 1), (1, 0, 2, 0, 0, 1)]
        return [
            (0, 0, 0, 0, 0, 1),
            (0, 0, 1, 1, 0, 1),
            (0, 0, 2, 0, 1, -1),
            (0, 1, 0, 0, 1, 1),
            (0, 1, 1, 1, 1, 1),
            (0, 1, 2, 0, 0, 1),
        ]

    def _views(self, weight, matrices):
        """Views of φ (rows, C) and ψ (rows, n, C) for every piece of W: (in a matrix, in W, columns, sign)."""
        rows, c = len(weight), self.channels
        parts = torch.view_as_real(weight).unbind(-1) if weight.is_complex() else [weight]
        third = self.width // (3 if self.skip else 1)
        slices = self.slices(matrices)
        for number, row, block, half, part, sign in self._pieces(weight.is_complex()):
            start = block * third - slices[number][1].start
            target = matrices[number][row * rows : (row + 1) * rows, start : start + third]
            source = parts[part][:, half * third : (half + 1) * third]
            phi, psi = slice(block * third, block * third + c), slice(block * third + c, (block + 1) * third)
            yield target[:, :c], source[:, :c], phi, sign
            yield (target[:, c:].unflatten(1, (-1, c)), source[:, c:].unflatten(1, (c, -1)).transpose(1, 2), psi, sign)

    def fold(self, weight, statistics):
        """W in canonical order -> the real matrices of W diag(r), giving consecutive columns of y."""
        scale = self.scale(statistics)
        rows = len(weight) * (2 if weight.is_complex() else 1)
        third = self.width // (3 if self.skip else 1)
        widths = [2 * third, third] if self.skip and not weight.is_complex() else [self.width]
        matrices = [scale.new_empty(rows, width) for width in widths]
        for target, source, columns, sign in self._views(weight, matrices):
            torch.mul(source, sign * scale[columns].view(target.shape[1:]), out=target)
        return matrices

    def unfold(self, gradients, weight, statistics):
        """Gradients of the real matrices of W diag(r) -> the gradient of W."""
        scale = self.scale(statistics)
        total = torch.empty_like(weight)
        begun = set()
        for gradient, target, columns, sign in self._views(total, gradients):
            factor = sign * scale[columns].view(gradient.shape[1:])
            if target.data_ptr() in begun:
                target.addcmul_(gradient, factor)
            else:
                torch.mul(gradient, factor, out=target)
                begun.add(target.data_ptr())
        return total

    def slices(self, matrices):
        """(columns of y, columns of the features) of each real matrix."""
        if len(matrices) == 1:
            return [(slice(0, len(matrices[0])), slice(0, self.width))]
        rows, third = len(matrices[0]), self.width // 3
        return [(slice(0, rows), slice(0, 2 * third)), (slice(rows, 2 * rows), slice(2 * third, None))]

    def column_statistics(self, std):
        """Statistics of a Standardization as real columns."""
        if not self.skip:
            return Statistics(std.mean[self.columns], std.var[self.columns])
        half = len(std.var) // 2
        mean, var = std.mean[self.columns], std.var[self.columns]
        return Statistics(
            torch.cat([mean.real, std.mean[half + self.columns].real, mean.imag]),
            torch.cat([var, std.var[half + self.columns], var]),
        )

    def channel_statistics(self, mean, var):
        """Real columns' statistics -> those of a Standardization, in canonical order."""
        if not self.skip:
            return mean[self.places], var[self.places]
        real, modulus, imaginary = (part[self.places] for part in mean.chunk(3))
        mean = torch.cat([torch.complex(real, imaginary), torch.complex(modulus, torch.zeros_like(modulus))])
        linear, modulus, _ = (part[self.places] for part in var.chunk(3))
        return mean, torch.cat([linear, modulus])

    # -- the steps of the operation -------------------------------------------------------------------------------

    def chunks(self, x, images=None):
        """Cut a slice of the batch (all of it) so that the wavelet coefficients fit the processor's cache."""
        per_image = 4 * self.channels * self.maps.planes() * math.prod(self.maps.out_shape)
        return _cut(images or slice(0, len(x)), (_CHUNK_BYTES_GPU if x.is_cuda else _CHUNK_BYTES) // per_image)

    def groups(self, x):
        """Cut the batch so that the projection's products have enough rows."""
        per_image = math.prod(self.maps.out_shape)
        return _cut(slice(0, len(x)), len(x) if x.is_cuda else -(-_GROUP_ROWS // per_image))

    def rows(self, images):
        """The rows of the features that belong to a slice of the batch."""
        positions = math.prod(self.maps.out_shape)
        return slice(images.start * positions, images.stop * positions)

    def chunk_features(self, x, out):
        """Features of a chunk of images, (P, width), written to `out`; returns the coefficients."""
        coefficients = self.maps(x)
        if self.skip:
            skip_features(coefficients, self.maps.slices, out.view(len(out), 3, -1, self.channels))
        else:
            modulus_features(coefficients, self.maps.slices, out.view(len(out), -1, self.channels))
        return coefficients

    def compute_features(self, x, statistics):
        """Features (B·M'·N', width) and their statistics: of this batch if none are given."""
        features = x.new_empty(self.rows(slice(0, len(x))).stop, self.width)
        moments = x.new_zeros(2, self.width, dtype=torch.float if x.device.type == "mps" else torch.double)
        for chunk in self.chunks(x):
            part = features[self.rows(chunk)]
            self.chunk_features(x[chunk], part)
            if statistics is None:
                moments[0] += part.sum(0)
                moments[1] += part.square().sum(0)
        if statistics is None:
            sum_over_ranks(moments)
            count = count_over_ranks(len(features), x.device)
            statistics = self._finish(moments / count, count)
        return features, statistics

    def _finish(self, moments, count):
        mean = torch.zeros_like(moments[0]) if self.standardized == "homogeneous" else moments[0]
        var = moments[1] - mean**2
        if self.skip:
            real, modulus, imaginary = var.chunk(3)
            var = torch.cat([real + imaginary, modulus, real + imaginary])
        return Statistics(mean.float(), var.clamp_min(0).float(), count)

    def scale(self, statistics):
        return torch.rsqrt(statistics.var + EPSILON) if self.standardized else torch.ones_like(statistics.var)

    def project(self, x, features, matrices, statistics, lower):
        """y (B, M', N', q·C') and, if it is normalised, the norms (B·M'·N', 1) it was divided by."""
        channels = sum(len(matrix) for matrix in matrices)
        slices = self.slices(matrices)
        biases = [-(w @ statistics.mean[columns]) for w, (_, columns) in zip(matrices, slices, strict=True)]
        y = x.new_empty(len(x), *self.maps.out_shape, channels)
        flat = y.view(-1, channels)
        norms = x.new_empty(len(flat), 1) if self.normalized else None
        for group in self.groups(x):
            rows = self.rows(group)
            if features is None:
                part = x.new_empty(rows.stop - rows.start, self.width)
                for chunk in self.chunks(x, group):
                    self.chunk_features(x[chunk], part[_within(self.rows(chunk), rows)])
            else:
                part = features[rows]
            for matrix, bias, (outputs, columns) in zip(matrices, biases, slices, strict=True):
                flat[rows, outputs] = _times_transposed(part[:, columns], matrix, bias, lower)
            if self.normalized:
                torch.linalg.vector_norm(flat[rows], dim=1, keepdim=True, out=norms[rows])
                flat[rows] /= norms[rows]
        return y, norms

    def undo_normalization(self, gradient, y, norms):
        """Gradient (B·M'·N', q·C') before the division by the norm."""
        gradient, y = gradient.reshape(-1, gradient.shape[-1]), y.view(-1, y.shape[-1])
        if not self.normalized:
            return gradient
        radial = torch.linalg.vecdot(gradient, y)[:, None]
        return torch.addcmul(gradient, y, radial, value=-1).div_(norms)

    def weight_products(self, gradient, features, total, matrices, statistics, lower):
        """Gradients of the matrices W diag(r): products of y's gradient and the centred features."""
        products = []
        for rows, columns in self.slices(matrices):
            product = sum(
                _transposed_times(g[:, rows], f[:, columns], lower)
                for g, f in zip(gradient.split(_PRODUCT_ROWS), features.split(_PRODUCT_ROWS), strict=True)
            )
            products.append(product.addr_(total[rows], statistics.mean[columns], alpha=-1))
        return products

    def statistics_gradient(self, matrices, products, total, statistics, of_batch):
        """What the batch's own statistics add to the features' gradient: features·slope + shift, each (width,).

        With W' = W diag(r), the gradient of x̂ summed against x̂ is the column sums of W'·(its gradient).
        """
        slope, shift = torch.zeros_like(statistics.var), torch.zeros_like(statistics.var)
        if not (self.standardized and of_batch):
            return slope, shift
        for w, product, (rows, columns) in zip(matrices, products, self.slices(matrices), strict=True):
            for w_rows, product_rows in zip(w.split(128), product.split(128), strict=True):  # in the cache
                slope[columns] += (w_rows * product_rows).sum(0)
            shift[columns] += total[rows] @ w
        sum_over_ranks(slope, shift)
        if self.skip:
            real, modulus, imaginary = slope.chunk(3)
            slope = torch.cat([real + imaginary, modulus, real + imaginary])
        slope *= -(self.scale(statistics) ** 2) / statistics.count
        if self.standardized == "homogeneous":
            return slope, torch.zeros_like(shift)
        return slope, -shift / statistics.count - slope * statistics.mean

    def input_gradient(self, x, gradient, features, matrices, slope, shift, lower):
        """Gradient of x (B, M, N, p·C), a group of images at a time."""
        x_gradient = torch.empty_like(x)
        for group in self.groups(x):
            rows = self.rows(group)
            features_gradient = x.new_empty(rows.stop - rows.start, self.width)
            for matrix, (outputs, columns) in zip(matrices, self.slices(matrices), strict=True):
                features_gradient[:, columns] = _times_transposed(
                    gradient[rows, outputs], matrix.t(), shift[columns], lower
                )
            for chunk in self.chunks(x, group):
                chunk_rows = self.rows(chunk)
                part, part_gradient = features[chunk_rows], features_gradient[_within(chunk_rows, rows)]
                part_gradient.addcmul_(part, slope)
                self.maps.adjoint(self.coefficients_gradient(x[chunk], part, part_gradient), x_gradient[chunk])
        return x_gradient

    def coefficients_gradient(self, x, features, gradient):
        """Gradients of the wavelet coefficients of a chunk from those of its features (P, width), overwritten."""
        if self.skip:
            shape = (len(features), 3, -1, self.channels)
            return skip_gradients(gradient.view(shape), features.view(shape), self.maps.slices)
        shape = (len(features), -1, self.channels)
        return modulus_gradients(gradient.view(shape), features.view(shape), self.maps(x), self.maps.slices)

    # -- what a block calls ---------------------------------------------------------------------------------------

    def forward(self, x, weight, std=None):
        """x (B, M, N, p·C) -> (B, M', N', q·C'); updates the running statistics of `std` in training.

        Args:
            weight: W (C', D) in canonical channel order, real or complex.
            std: the block's Standardization, if it has one.
        """
        statistics = None if std is not None and std.training else self.fixed_statistics(std, x.device)
        lower = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        with torch.autocast(x.device.type, enabled=False):
            x = self.maps.split(x.float()).contiguous()
            y, mean, var, count = _FusedBlock.apply(x, weight, self, statistics, lower)
        if statistics is None:
            std.update(*self.channel_statistics(mean, var), int(count))
        return self.maps.join(y)

    def fixed_statistics(self, std, device):
        """The running statistics of a Standardization as real columns; those that change nothing for None."""
        if std is not None:
            return self.column_statistics(std)
        zero = torch.zeros(self.width, device=device)
        return Statistics(zero, zero + 1)

    @torch.no_grad()
    def columns_of(self, x):
        """Features before standardisation of x (B, M, N, p·C), as it computes with them: (B·M'·N', width) real."""
        statistics = Statistics(x.new_zeros(0), x.new_zeros(0))
        return self.compute_features(self.maps.split(x).contiguous(), statistics)[0]

    def parts_of(self, columns):
        """Real and imaginary parts of columns, each with its order: channel d's real part is column order[d].

        The imaginary part is (None, None) for real features; it is that of the first channels, those of z.
        """
        if not self.skip:
            return (columns, self.places), (None, None)
        third = self.width // 3
        order = torch.cat([self.places, third + self.places])
        return (columns[:, : 2 * third], order), (columns[:, 2 * third :], self.places)

    @torch.no_grad()
    def forward_from(self, columns, x, weight, std=None):
        """`forward` in evaluation mode, given the columns of x."""
        statistics = self.fixed_statistics(std, x.device)
        y, _ = self.project(self.maps.split(x), columns, self.fold(weight, statistics), statistics, None)
        return self.maps.join(y)

    @torch.no_grad()
    def features(self, x):
        """x (B, C, M, N) -> [φ, |ψ|] or [z, |z|] (B, D, M', N') in canonical channel order; no gradients."""
        statistics = Statistics(x.new_zeros(0), x.new_zeros(0))
        features, _ = self.compute_features(self.maps.split(to_planar(x)).contiguous(), statistics)
        features = self.maps.join(features.view(-1, *self.maps.out_shape, self.width))  # (B, M', N', width)
        features = features.movedim(-1, 1)
        if not self.skip:
            return features[:, self.places]
        real, modulus, imaginary = (part[:, self.places] for part in features.chunk(3, 1))
        return torch.cat([torch.complex(real, imaginary), modulus.to(torch.cfloat)], 1)


def fused(block_signal, stages):
    """The FusedBlock of a list of modules, or None where they are not of its pattern.

    The pattern is `Fw [rho] [Std] P|Pr|Pc [N]` with the complex modulus, ψ ↦ |ψ| or z ↦ [z, |z|].
    """
    kinds = [type(stage).__name__ for stage in stages]
    skip = kinds[1:2] == ["SkipConnection"]
    expected = ["WaveletTransform"] + ["SkipConnection"] * skip
    rest = kinds[len(expected) :]
    standardized = rest[:1] == ["Standardization"]
    normalized = rest[-1:] == ["Normalization"]
    expected += ["Standardization"] * standardized + ["Projection"] + ["Normalization"] * normalized
    if kinds != expected or not _plain_modulus(stages, skip) or (block_signal.complex and not skip):
        return None
    transform, projection = stages[0], stages[len(expected) - 1 - normalized]
    if projection.basis is not None or not transform.number:
        return None
    std = stages[1 + skip] if standardized else None
    return FusedBlock(
        transform,
        skip,
        "homogeneous" if standardized and std.homogeneous else standardized,
        normalized,
        (block_signal.height, block_signal.width),
        2 if block_signal.complex else 1,
        block_signal.channels,
    )


def _plain_modulus(stages, skip):
    """Whether the only non-linearity is the complex modulus, at its place, with nothing beside it."""
    transform = stages[0]
    if len(transform.phi) or transform.number == 0:
        return False
    if skip:
        rho = stages[1]
        return not (len(transform.psi) or len(rho.left) or len(rho.right)) and rho.rho.name == "mod"
    inner = list(transform.psi)
    return len(inner) == 1 and isinstance(inner[0], NonLinearity) and inner[0].name == "mod"


def to_planar(x):
    """(B, C, M, N) real or complex -> (B, M, N, p·C) real, contiguous; real parts first."""
    x = x.movedim(1, -1)
    return torch.cat([x.real, x.imag], -1) if x.is_complex() else x.contiguous()


def from_planar(x, parts):
    """The inverse of `to_planar`."""
    x = x.movedim(-1, 1)
    return x if parts == 1 else torch.complex(*x.chunk(2, 1))
