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

from models.nonlinearity import NonLinearity
from models.scattering import output_size, padding_indices
from models.standardization import EPSILON, sum_over_ranks

_RANK_TOLERANCE = 1e-7  # singular values below this part of the largest are lost in float32 anyway
_SEPARABLE_OVERHEAD = 2.5  # measured: what a multiply-add of two small products costs beside one of a dense product
_FEW_CHANNELS = 32  # measured: with fewer, images go through side by side, as channels of one
_CHUNK_BYTES = 4 << 20  # measured: wavelet coefficients of a chunk on a CPU
_CHUNK_BYTES_GPU = 1 << 30
_SMALLEST_MODULUS = 1e-18  # below it the modulus has no gradient


# ---------------------------------------------------------------------------------------------------------------------
# The wavelet transform as matrices
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Filters computed together: which (φ is number n), and the matrices along the rows, then along the columns."""

    filters: tuple
    rows: np.ndarray | None  # (M'·R, M); None in a dense transform
    columns: np.ndarray  # (N'·planes, R·N·parts), or (M'·N'·planes, M·N·parts) in a dense transform


def _axis_map(factor, size, subsample):
    """(M', M) matrix: pad an axis, convolve it with the periodic `factor` (P,), subsample and crop."""
    indices = np.array(padding_indices(size))
    padded = len(indices)
    outputs = np.arange(output_size(size, subsample))
    outputs = 2 * (outputs + 1) if subsample else outputs + 2
    matrix = np.zeros((len(outputs), size))
    for place, index in enumerate(indices):
        matrix[:, index] += factor[(outputs - place) % padded]
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


def _separable_group(filters, kernels, shape, subsample, parts, phi_parts):
    """The group of filters that are sums of the same R separable terms, found by an SVD."""
    planes = np.concatenate([np.concatenate([kernels[f].real.T, kernels[f].imag.T]) for f in filters])  # (2·f·Q, P)
    columns, scales, rows = np.linalg.svd(planes, full_matrices=False)
    rank = max(1, int((scales > _RANK_TOLERANCE * scales[0]).sum()))
    row_maps = np.stack([_axis_map(row, shape[0], subsample) for row in rows[:rank]], 1)  # (M', R, M)
    columns = (columns[:, :rank] * scales[:rank]).reshape(len(filters), 2, kernels.shape[2], rank)
    maps = [
        [np.stack([_axis_map(part[:, r], shape[1], subsample) for r in range(rank)], 1) for part in column]
        for column in columns
    ]
    return _Group(tuple(filters), row_maps.reshape(-1, shape[0]), _group_matrix(maps, parts, phi_parts))


def _dense_group(filters, kernels, shape, subsample, parts, phi_parts):
    """The group of filters computed by one matrix from all pixels of an image."""
    rows, columns = (np.array(padding_indices(size)) for size in shape)
    out = [output_size(size, subsample) for size in shape]
    step, start = (2, 2) if subsample else (1, 2)
    maps = []
    for f in filters:
        matrix = np.zeros((out[0], out[1], *shape), dtype=complex)
        y, x = (start + step * np.arange(size) for size in out)
        for p, row in enumerate(rows):
            for q, column in enumerate(columns):
                matrix[:, :, row, column] += kernels[f][np.ix_((y - p) % len(rows), (x - q) % len(columns))]
        flat = matrix.reshape(out[0] * out[1], 1, -1)
        maps.append((flat.real, flat.imag))
    return _Group(tuple(filters), None, _group_matrix(maps, parts, phi_parts))


@cache
def _plan(bank_key, shape, subsample, parts, phi_parts):
    """The groups, φ's first, of the cheaper of the separable and the dense transform."""
    kernels = _kernels(bank_key.bank)
    phi = len(kernels) - 1
    arguments = (kernels, shape, subsample, parts)
    groups = [_separable_group([phi], *arguments, phi_parts)]
    groups += [_separable_group(group, *arguments, 2) for group in _mirrored_groups(kernels[:phi])]
    rows = output_size(shape[0], subsample)
    separable = sum(group.rows.size * shape[1] * parts + group.columns.size * rows for group in groups)
    pixels = math.prod(shape) * parts
    dense = rows * output_size(shape[1], subsample) * (phi_parts + 2 * phi) * pixels
    if dense > _SEPARABLE_OVERHEAD * separable:
        return groups
    return [_dense_group([phi], *arguments, phi_parts), _dense_group(range(phi), *arguments, 2)]


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
        groups = _plan(_BankKey(bank), shape, subsample, parts, phi_parts)
        self.shape, self.parts = shape, parts
        self.out_shape = tuple(output_size(size, subsample) for size in shape)
        self.filters = [group.filters for group in groups]
        self.group_parts = [phi_parts] + [2] * (len(groups) - 1)
        for index, group in enumerate(groups):
            self._register(f"rows_{index}", group.rows)
            self._register(f"columns_{index}", group.columns)

    def _register(self, name, matrix):
        forward = None if matrix is None else torch.from_numpy(matrix.astype(np.float32))
        backward = None if matrix is None else forward.t().contiguous()
        self.register_buffer(name, forward, persistent=False)
        self.register_buffer(f"{name}_adjoint", backward, persistent=False)

    @property
    def order(self):
        """Filter numbers in the order in which the groups give them, φ (number n) first."""
        return [f for filters in self.filters for f in filters]

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
            z = torch.bmm(columns.expand(len(mapped), -1, -1), mapped)  # (b·M', N'·parts·filters, C)
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
                mapped = torch.bmm(columns.expand(batch, -1, -1), gradient.view(batch, -1, c))  # (b·M', R·N·p, C)
                torch.baddbmm(total, rows.expand(b, -1, -1), mapped.view(b, -1, n * pc), beta=beta, out=total)


# ---------------------------------------------------------------------------------------------------------------------
# The block as one differentiable operation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of every real column of the features, and how many samples they are of."""

    mean: torch.Tensor
    var: torch.Tensor
    count: int = 0


def modulus_features(coefficients, out):
    """[φ, |ψ|] of a chunk: groups (P, parts, filters, C) -> `out` (P, 1 + n, C)."""
    out[:, 0] = coefficients[0][:, 0, 0]
    start = 1
    for z in coefficients[1:]:
        stop = start + z.shape[2]
        _modulus(z, out[:, start:stop])
        start = stop


def modulus_gradients(gradient, features, coefficients):
    """Gradients of the coefficients, over `coefficients`, from those of [φ, |ψ|] (over `gradient`)."""
    coefficients[0][:, 0, 0] = gradient[:, 0]
    ratio = gradient.div_(features.clamp_min(_SMALLEST_MODULUS))
    start = 1
    for z in coefficients[1:]:
        stop = start + z.shape[2]
        z.mul_(ratio[:, None, start:stop])
        start = stop
    return coefficients


def skip_features(coefficients, out):
    """[Re z, |z|, Im z] of a chunk, z = [φ, ψ]: groups (P, 2, filters, C) -> `out` (P, 3, 1 + n, C)."""
    start = 0
    for z in coefficients:
        stop = start + z.shape[2]
        out[:, 0::2, start:stop] = z
        _modulus(z, out[:, 1, start:stop])
        start = stop


def skip_gradients(gradient, features, sizes):
    """Gradients of each group's coefficients from those of [Re z, |z|, Im z]; the coefficients are in `features`."""
    ratio = torch.div(gradient[:, 1], features[:, 1].clamp_min(_SMALLEST_MODULUS))
    gradients, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        gradients.append(torch.addcmul(gradient[:, 0::2, part], ratio[:, None, part], features[:, 0::2, part]))
        start += size
    return gradients


def _modulus(z, out):
    squared = torch.mul(z[:, 0], z[:, 0])
    squared.addcmul_(z[:, 1], z[:, 1])
    torch.sqrt(squared, out=out)


class _FusedBlock(torch.autograd.Function):
    """x (B, M, N, p·C), real matrices of the projection -> y (B, M', N', q·C') and the features' statistics.

    The matrices W_1, W_2, … give consecutive columns of y from the columns `plan.columns` of the features.
    """

    @staticmethod
    def forward(ctx, x, plan, statistics, *matrices):
        keep = any(ctx.needs_input_grad)
        ctx.batch_statistics = statistics is None
        if keep or statistics is None:
            features, statistics = plan.compute_features(x, statistics)
        else:
            features = None
        folded, biases = plan.fold(matrices, statistics)
        y, norm = plan.project(x, features, folded, biases)
        if keep:
            ctx.plan, ctx.statistics = plan, statistics
            ctx.save_for_backward(x, features, y, norm, *matrices)
        count = torch.tensor(statistics.count)
        ctx.mark_non_differentiable(statistics.mean, statistics.var, count)
        return y, statistics.mean, statistics.var, count

    @staticmethod
    def backward(ctx, gradient, *_statistics):
        x, features, y, norm, *matrices = ctx.saved_tensors
        plan, statistics = ctx.plan, ctx.statistics
        gradient = plan.undo_normalization(gradient, y, norm)
        total = gradient.sum(0)
        products = [gradient[:, rows].t() @ features[:, columns] for rows, columns in plan.slices(matrices)]
        scale = plan.scale(statistics)
        weight_gradients = [
            (product - torch.outer(total[rows], statistics.mean[columns])) * scale[columns]
            for product, (rows, columns) in zip(products, plan.slices(matrices), strict=True)
        ]
        x_gradient = None
        if ctx.needs_input_grad[0]:
            slope, shift = plan.statistics_gradient(matrices, weight_gradients, total, statistics, ctx.batch_statistics)
            x_gradient = plan.input_gradient(x, gradient, features, matrices, scale, slope, shift)
        return x_gradient, None, None, *weight_gradients


class FusedBlock(nn.Module):
    """What a block of the pattern `Fw [rho] [Std] P|Pr|Pc [N]` computes, as one operation. See `fusable`."""

    def __init__(self, transform, skip, standardized, normalized, shape, parts, channels, out_parts):
        super().__init__()
        self.skip, self.standardized, self.normalized = skip, standardized, normalized
        self.parts, self.channels, self.out_parts = parts, channels, out_parts
        bank = transform.bank.cpu().numpy()
        self.maps = WaveletMaps(bank, shape, transform.subsample, parts, phi_parts=2 if skip else 1)
        self.width = channels * transform.bank.shape[0] * (3 if skip else 1)  # real columns of the features
        number = transform.number
        psi = channels + torch.arange(channels * number).view(channels, number)
        columns = [torch.arange(channels)] + [psi[:, f] for f in self.maps.order[1:]]
        self.register_buffer("columns", torch.cat(columns), persistent=False)  # canonical channel of each column
        self.register_buffer("places", torch.argsort(self.columns), persistent=False)

    # -- from the module's weights and buffers to real columns, and back ------------------------------------------

    def real_matrices(self, weight):
        """W (C', D) in canonical channel order, real or complex -> the real matrices of `_FusedBlock`."""
        if not self.skip:
            weight = weight[:, self.columns]
            return [torch.cat([weight.real, weight.imag])] if weight.is_complex() else [weight]
        half = weight.shape[1] // 2
        linear, modulus = weight[:, self.columns], weight[:, half + self.columns]
        if not weight.is_complex():
            return [torch.cat([linear, modulus], 1), linear]
        real = torch.cat([linear.real, modulus.real, -linear.imag], 1)
        imaginary = torch.cat([linear.imag, modulus.imag, linear.real], 1)
        return [torch.cat([real, imaginary])]

    def slices(self, matrices):
        """(rows of y, columns of the features) of each matrix."""
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
        return Statistics(torch.cat([mean.real, std.mean[half + self.columns].real, mean.imag]),
                          torch.cat([var, std.var[half + self.columns], var]))

    def channel_statistics(self, mean, var):
        """Real columns' statistics -> those of a Standardization, in canonical order."""
        if not self.skip:
            return mean[self.places], var[self.places]
        real, modulus, imaginary = (part[self.places] for part in mean.chunk(3))
        mean = torch.cat([torch.complex(real, imaginary), torch.complex(modulus, torch.zeros_like(modulus))])
        linear, modulus, _ = (part[self.places] for part in var.chunk(3))
        return mean, torch.cat([linear, modulus])

    # -- the steps of the operation -------------------------------------------------------------------------------

    def chunks(self, x):
        """Slices of the batch whose wavelet coefficients fit the processor's cache."""
        per_image = 4 * self.channels * self.maps.planes() * math.prod(self.maps.out_shape)
        size = max(1, (_CHUNK_BYTES_GPU if x.is_cuda else _CHUNK_BYTES) // per_image)
        return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]

    def chunk_features(self, x, out):
        """Features of a chunk of images, (P, width), written to `out`; returns the coefficients."""
        coefficients = self.maps(x)
        if self.skip:
            skip_features(coefficients, out.view(len(out), 3, -1, self.channels))
        else:
            modulus_features(coefficients, out.view(len(out), -1, self.channels))
        return coefficients

    def compute_features(self, x, statistics):
        """Features (B·M'·N', width) and their statistics: of this batch if none are given."""
        positions = math.prod(self.maps.out_shape)
        features = x.new_empty(len(x) * positions, self.width)
        moments = x.new_zeros(2, self.width, dtype=torch.float64)
        for chunk in self.chunks(x):
            part = features[chunk.start * positions : chunk.stop * positions]
            self.chunk_features(x[chunk], part)
            if statistics is None:
                moments[0] += part.sum(0)
                moments[1] += part.square().sum(0)
        if statistics is None:
            count = torch.tensor(float(len(features)), device=x.device)
            sum_over_ranks(moments, count)
            statistics = self._finish(moments / count, int(count))
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

    def fold(self, matrices, statistics):
        """Fold the standardisation into the projection: W diag(r) and -W diag(r) m."""
        scale = self.scale(statistics)
        slices = self.slices(matrices)
        folded = [w * scale[columns] for w, (_, columns) in zip(matrices, slices, strict=True)]
        biases = [-(w @ statistics.mean[columns]) for w, (_, columns) in zip(folded, slices, strict=True)]
        return folded, biases

    def project(self, x, features, folded, biases):
        """y (B, M', N', q·C') and, if it is normalised, the norms (B·M'·N', 1) it was divided by."""
        height, width = self.maps.out_shape
        positions = height * width
        channels = sum(len(matrix) for matrix in folded)
        y = x.new_empty(len(x), height, width, channels)
        flat = y.view(-1, channels)
        norms = x.new_empty(len(flat), 1) if self.normalized else None
        buffer = None
        for chunk in self.chunks(x):
            rows = slice(chunk.start * positions, chunk.stop * positions)
            if features is None:
                if buffer is None:
                    buffer = x.new_empty((chunk.stop - chunk.start) * positions, self.width)
                part = buffer[: rows.stop - rows.start]
                self.chunk_features(x[chunk], part)
            else:
                part = features[rows]
            for matrix, bias, (outputs, columns) in zip(folded, biases, self.slices(folded), strict=True):
                torch.addmm(bias, part[:, columns], matrix.t(), out=flat[rows, outputs])
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

    def statistics_gradient(self, matrices, weight_gradients, total, statistics, of_batch):
        """What the batch's own statistics add to the features' gradient: features·slope + shift, each (width,)."""
        slope = torch.zeros(self.width, device=total.device)
        shift = torch.zeros(self.width, device=total.device)
        if not (self.standardized and of_batch):
            return slope, shift
        for w, dw, (rows, columns) in zip(matrices, weight_gradients, self.slices(matrices), strict=True):
            slope[columns] += (w * dw).sum(0)
            shift[columns] += total[rows] @ w
        sum_over_ranks(slope, shift)
        if self.skip:
            real, modulus, imaginary = slope.chunk(3)
            slope = torch.cat([real + imaginary, modulus, real + imaginary])
        scale = self.scale(statistics)
        slope = -(scale**2) * slope / statistics.count
        if self.standardized == "homogeneous":
            return slope, torch.zeros_like(slope)
        return slope, -scale * shift / statistics.count - slope * statistics.mean

    def input_gradient(self, x, gradient, features, matrices, scale, slope, shift):
        """Gradient of x (B, M, N, p·C), a chunk at a time."""
        positions = math.prod(self.maps.out_shape)
        x_gradient = torch.empty_like(x)
        folded = [w * scale[columns] for w, (_, columns) in zip(matrices, self.slices(matrices), strict=True)]
        sizes = [len(filters) for filters in self.maps.filters]
        for chunk in self.chunks(x):
            rows = slice(chunk.start * positions, chunk.stop * positions)
            part = features[rows]
            part_gradient = torch.empty_like(part)
            for matrix, (outputs, columns) in zip(folded, self.slices(matrices), strict=True):
                torch.addmm(shift[columns], gradient[rows, outputs], matrix, out=part_gradient[:, columns])
            part_gradient.addcmul_(part, slope)
            if self.skip:
                shape = (len(part), 3, -1, self.channels)
                gradients = skip_gradients(part_gradient.view(shape), part.view(shape), sizes)
            else:
                shape = (len(part), -1, self.channels)
                gradients = modulus_gradients(part_gradient.view(shape), part.view(shape), self.maps(x[chunk]))
            self.maps.adjoint(gradients, x_gradient[chunk])
        return x_gradient

    # -- what a block calls ---------------------------------------------------------------------------------------

    def forward(self, x, weight, std=None):
        """x (B, M, N, p·C) -> (B, M', N', q·C'); updates the running statistics of `std` in training.

        Args:
            weight: W (C', D) in canonical channel order, real or complex.
            std: the block's Standardization, if it has one.
        """
        if std is None:
            zero = x.new_zeros(self.width, dtype=torch.float)
            statistics = Statistics(zero, zero + 1)
        else:
            statistics = None if std.training else self.column_statistics(std)
        y, mean, var, count = _FusedBlock.apply(x, self, statistics, *self.real_matrices(weight))
        if statistics is None:
            std.update(*self.channel_statistics(mean, var), int(count))
        return y

    @torch.no_grad()
    def features(self, x):
        """x (B, C, M, N) -> [φ, |ψ|] or [z, |z|] (B, D, M', N') in canonical channel order; no gradients."""
        statistics = Statistics(x.new_zeros(0), x.new_zeros(0))
        features, _ = self.compute_features(to_planar(x), statistics)
        features = features.view(len(x), *self.maps.out_shape, -1).movedim(-1, 1)  # (B, width, M', N')
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
        transform, skip, "homogeneous" if standardized and std.homogeneous else standardized, normalized,
        (block_signal.height, block_signal.width), 2 if block_signal.complex else 1, block_signal.channels,
        2 if projection.out.complex else 1,
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
