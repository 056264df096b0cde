"""The wavelet transform of a block as real matrix products, equal to the transform by FFT of `scattering.py`.

Padding, filtering, subsampling and cropping are one linear map of the image. A Morlet filter is a short sum of
separable ones, so the map is a product of small matrices along the rows, then along the columns; for small images one
dense matrix is cheaper, and large images are cut into overlapping windows.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from models.matmul import times_batch
from models.signal import output_size, padding_indices

_RANK_TOLERANCE = 1e-7  # singular values below this part of the largest are lost in float32 anyway
_SEPARABLE_OVERHEAD = 2.5  # measured: what a multiply-add of two small products costs relative to a dense product's
_LARGE_IMAGE = 48  # measured: from this size on, images are cut into windows of as many outputs:
_WINDOWS = (16, 14, 12, 20, 24, 28)
_FEW_CHANNELS = 32  # measured: with fewer, images go through side by side, as channels of one


@dataclass(frozen=True)
class _Group:
    """Filters computed together: which (φ is number n), and the matrices along the rows, then along the columns."""

    filters: list
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
        """(…, M', M) matrices of the convolution with the periodic factors (…, P)."""
        places = (self.outputs[:, None] - np.arange(len(self.sources))) % factor.shape[-1]
        return factor[..., places] @ np.eye(self.size)[self.sources]


def _group_matrix(maps, parts, phi_parts):
    """Real matrix of complex filters: maps (filters, N', R, N) -> (N'·planes, R·N·parts).

    Rows are ordered by (position, part, filter); `phi_parts` is 1 for a real φ alone in its group.
    """
    maps = np.moveaxis(maps, 0, 1)  # (N', filters, R, N)
    from_real = np.stack([maps.real, maps.imag], 1)  # (N', 2, filters, R, N)
    from_imaginary = np.stack([-maps.imag, maps.real], 1)
    matrix = np.stack([from_real, from_imaginary][:parts], -1)[:, :phi_parts]  # (N', parts, filters, R, N, parts)
    return matrix.reshape(np.prod(matrix.shape[:3]), -1)


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
    planes = np.concatenate([plane.T for f in filters for plane in (kernels[f].real, kernels[f].imag)])  # (2·f·Q, P)
    columns, scales, rows = np.linalg.svd(planes, full_matrices=False)
    rank = max(1, int((scales > _RANK_TOLERANCE * scales[0]).sum()))
    row_maps = axes[0].matrix(rows[:rank]).swapaxes(0, 1)  # (M', R, M)
    columns = (columns[:, :rank] * scales[:rank]).reshape(len(filters), 2, -1, rank)
    columns = (columns[:, 0] + 1j * columns[:, 1]).swapaxes(1, 2)  # (filters, R, Q)
    maps = axes[1].matrix(columns).swapaxes(1, 2)  # (filters, N', R, N)
    return _Group(filters, row_maps.reshape(-1, axes[0].size), _group_matrix(maps, parts, phi_parts))


def _dense_group(filters, kernels, axes, parts, phi_parts):
    """The group of filters computed by one matrix from all pixels of an image."""
    columns = axes[1].matrix(kernels[list(filters)])  # (filters, P, N', N)
    maps = axes[0].matrix(np.moveaxis(columns, 1, 3)).transpose(0, 3, 1, 4, 2)  # (filters, M', N', M, N)
    positions = maps.shape[1] * maps.shape[2]
    maps = maps.reshape(len(maps), positions, 1, -1)  # (filters, M'·N', 1, M·N)
    return _Group(filters, None, _group_matrix(maps, parts, phi_parts))


def _place(filters):
    """Where in [φ, ψ] one filter of ψ is, or two, or all in a row, as a slice."""
    step = filters[1] - filters[0] if len(filters) > 1 else 1
    return slice(filters[0] + 1, filters[-1] + 2, step)


def _reach(kernels):
    """How far from the origin the filters reach, in samples, to float32 accuracy."""
    magnitude = np.abs(kernels).max(0)
    offsets = [np.minimum(np.arange(size), size - np.arange(size)) for size in magnitude.shape]
    significant = magnitude > _RANK_TOLERANCE * magnitude.max()
    return int(max(offsets[0][significant.any(1)].max(), offsets[1][significant.any(0)].max()))


def _window(shape, subsample, kernels):
    """The axis of the windows that a large image is cut into; None if it is small or cannot be cut."""
    outputs = [output_size(size, subsample) for size in shape]
    length = next((size for size in _WINDOWS if all(output % size == 0 for output in outputs)), None)
    if min(shape) < _LARGE_IMAGE or length is None:
        return None
    axis = _Axis.window(length, subsample, _reach(kernels))
    return axis if axis.size <= min(kernels.shape[1:]) else None


@cache
def _plan(bank_bytes, bank_shape, shape, subsample, parts, phi_parts):
    """How to transform images of `shape` cheaply: whether in windows, their or the images' axes, groups (φ's first)."""
    bank = np.frombuffer(bank_bytes, np.float32).reshape(bank_shape)
    kernels = np.fft.ifft2(bank.astype(np.float64))  # (n + 1, P, Q) filters in space
    phi = len(kernels) - 1
    window = _window(shape, subsample, kernels)
    axes = [window] * 2 if window else [_Axis.whole(size, subsample) for size in shape]
    arguments = (kernels, axes, parts)
    groups = [_separable_group([phi], *arguments, phi_parts)]
    groups += [_separable_group(group, *arguments, 2) for group in _mirrored_groups(kernels[:phi])]
    rows, columns = (len(axis.outputs) for axis in axes)
    separable = sum(group.rows.size * axes[1].size * parts + group.columns.size * rows for group in groups)
    dense = rows * columns * (phi_parts + 2 * phi) * axes[0].size * axes[1].size * parts
    if not window and dense < _SEPARABLE_OVERHEAD * separable:
        groups = [_dense_group([phi], *arguments, phi_parts), _dense_group(range(phi), *arguments, 2)]
    return window is not None, axes, groups


class WaveletMaps(nn.Module):
    """The wavelet transform and its adjoint on chunks of planar images (b, M, N, p·C), as matrix products.

    `bank`: (n + 1, P, Q) real DFTs of the filters, φ last. `subsample`: the output is subsampled by 2. `parts`: 1 for
    real images, 2 for complex ones. `phi_parts`: those of φ wanted; 2 also for the zero imaginary part of a real φ.
    `places`: where in [φ, ψ] the filters of each group are; `planes`: real planes of a channel's coefficients.
    """

    def __init__(self, bank, shape, subsample, parts, phi_parts):
        super().__init__()
        in_windows, axes, groups = _plan(bank.tobytes(), bank.shape, shape, subsample, parts, phi_parts)
        self.parts, self.windows = parts, None
        self.out_shape = tuple(len(axis.outputs) for axis in axes)
        if in_windows:
            self.windows = tuple(output_size(size, subsample) // length for size, length in zip(shape, self.out_shape))
            for name, size in zip(("window_rows", "window_columns"), shape, strict=True):
                self.register_buffer(name, _window_sources(size, subsample, axes[0]), persistent=False)
        self.places = [slice(0, 1)] + [_place(group.filters) for group in groups[1:]]
        self.shapes = [(2 if index else phi_parts, len(group.filters)) for index, group in enumerate(groups)]
        self.planes = sum(parts * filters for parts, filters in self.shapes)
        for index, group in enumerate(groups):
            self._register(f"rows_{index}", group.rows)
            self._register(f"columns_{index}", group.columns)

    def _register(self, name, matrix):
        forward = None if matrix is None else torch.from_numpy(matrix.astype(np.float32))
        self.register_buffer(name, forward, persistent=False)
        self.register_buffer(f"{name}_adjoint", None if matrix is None else forward.t().contiguous(), persistent=False)

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

    def forward(self, x):
        """x (b, M, N, p·C) -> for each group z (b·M'·N', parts, filters, C)."""
        b, m, n, pc = x.shape
        c = pc // self.parts
        if b == 1 or c >= _FEW_CHANNELS:
            return self._coefficients(x)
        x = x.view(b, m, n, self.parts, c).permute(1, 2, 3, 0, 4).reshape(1, m, n, -1).contiguous()
        return [
            z.unflatten(-1, (b, c)).movedim(3, 0).reshape(-1, *z.shape[1:3], c)  # (b·M'·N', parts, filters, C)
            for z in self._coefficients(x)
        ]

    def _coefficients(self, x):
        b, m, n, pc = x.shape
        c = pc // self.parts
        coefficients = []
        for index, shape in enumerate(self.shapes):
            rows, mapped = getattr(self, f"rows_{index}"), x.view(b, m, n * pc)
            if rows is not None:
                mapped = torch.bmm(rows.expand(b, -1, -1), mapped)  # (b, M'·R, N·p·C)
            batch = b if rows is None else b * self.out_shape[0]
            z = times_batch(getattr(self, f"columns_{index}"), mapped.view(batch, -1, c))
            coefficients.append(z.view(-1, *shape, c))
        return coefficients

    def adjoint(self, gradients, out):
        """Gradients with respect to each group's output -> the gradient with respect to x, written to `out`."""
        b, m, n, pc = out.shape
        c = pc // self.parts
        if b == 1 or c >= _FEW_CHANNELS:
            return self._adjoint(gradients, out)
        total = out.new_empty(1, m, n, self.parts * b * c)
        apart = [g.view(b, -1, *g.shape[1:]) for g in gradients]
        self._adjoint([g.movedim(0, 3).reshape(-1, *g.shape[2:4], b * c) for g in apart], total)
        out.view(b, m, n, self.parts, c).copy_(total.view(m, n, self.parts, b, c).permute(3, 0, 1, 2, 4))
        return None

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
                mapped = times_batch(columns, gradient.view(batch, -1, c))  # (b·M', R·N·p, C)
                torch.baddbmm(total, rows.expand(b, -1, -1), mapped.view(b, -1, n * pc), beta=beta, out=total)


def _window_sources(size, subsample, axis):
    """Input indices of all windows of an axis, one window after another."""
    whole = _Axis.whole(size, subsample)
    starts = whole.outputs[:: len(axis.outputs)] - axis.outputs[0]
    places = (starts[:, None] + np.arange(axis.size)) % len(whole.sources)
    return torch.from_numpy(whole.sources[places].reshape(-1))
