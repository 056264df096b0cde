"""The fast path of a block: wavelets, modulus, standardisation, projection and normalisation in one operation.

It computes what the modules of `block.py` compute one after another, for the blocks of the paper, near the cost of the
projection's own matrix products:

- The wavelet transform is a product of small matrices (`wavelet_maps.py`).
- Channels lie last in memory, the parts of complex numbers apart (`planar.py`): every step is a matrix product with
  long rows.
- Images go through in chunks that fit the processor's cache. The backward pass recomputes the complex wavelet
  coefficients if only their modulus was kept.
- Standardisation is folded into the weights of the projection: W diag(r), and a bias.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from models.matmul import times_transposed, transposed_times
from models.planar import ColumnLayout, consecutive, to_planar
from models.standardization import EPSILON, count_over_ranks, sum_over_ranks
from models.wavelet_maps import WaveletMaps

_CHUNK_BYTES = 4 << 20  # measured: wavelet coefficients of a chunk on a CPU
_CHUNK_BYTES_GPU = 1 << 30
_GROUP_ROWS = 2048  # measured: with fewer rows, reading the weights dominates the projection
_PRODUCT_ROWS = 16384  # bounds the copies of the features' columns that the weights' gradients need
_SMALLEST_MODULUS = 1e-18  # below it the modulus has no gradient


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
        matrices = plan.layout.fold(weight, plan.scale(statistics))
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
        weight_gradient = x_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = plan.layout.unfold(products, weight, plan.scale(statistics))
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
    """What a block of the pattern `Fw [rho] [Std] P|Pr|Pc [N]` computes, as one operation.

    Args:
        transform: the WaveletTransform.
        signal: type of the block's input.
        skip: whether the features are [z, |z|] instead of [φ, |ψ|].
        standardized: whether there is a Standardization; "homogeneous" for one that keeps the mean at 0.
        normalized: whether there is a Normalization.
    """

    def __init__(self, transform, signal, skip, standardized, normalized):
        super().__init__()
        self.skip, self.standardized, self.normalized, self.channels = skip, standardized, normalized, signal.channels
        bank, shape, parts = transform.bank.cpu().numpy(), (signal.height, signal.width), 2 if signal.complex else 1
        self.maps = WaveletMaps(bank, shape, transform.subsample, parts, phi_parts=2 if skip else 1)
        self.layout = ColumnLayout(signal.channels, transform.number, skip)
        self.width = self.layout.width

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
        """Write the features of a chunk of images to `out` (P, width)."""
        if self.skip:
            skip_features(self.maps(x), self.maps.slices, out.view(len(out), 3, -1, self.channels))
        else:
            modulus_features(self.maps(x), self.maps.slices, out.view(len(out), -1, self.channels))

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
            statistics = self._statistics(moments, count_over_ranks(len(features), x.device))
        return features, statistics

    def _statistics(self, sums, count):
        mean, squares = sums / count
        mean = torch.zeros_like(mean) if self.standardized == "homogeneous" else mean
        return Statistics(mean.float(), self.layout.tied(squares - mean**2).clamp_min(0).float(), count)

    def scale(self, statistics):
        """r of W diag(r), (width,)."""
        return torch.rsqrt(statistics.var + EPSILON) if self.standardized else torch.ones_like(statistics.var)

    def project(self, x, features, matrices, statistics, lower):
        """y (B, M', N', q·C') and, if it is normalised, the norms (B·M'·N', 1) it was divided by."""
        slices = consecutive(matrices)
        biases = [-(w @ statistics.mean[columns]) for w, (_, columns) in zip(matrices, slices, strict=True)]
        y = x.new_empty(len(x), *self.maps.out_shape, sum(len(matrix) for matrix in matrices))
        flat = y.view(-1, y.shape[-1])
        norms = x.new_empty(len(flat), 1) if self.normalized else None
        for group in self.groups(x):
            rows = self.rows(group)
            part = self._group_features(x, group) if features is None else features[rows]
            for matrix, bias, (outputs, columns) in zip(matrices, biases, slices, strict=True):
                flat[rows, outputs] = times_transposed(part[:, columns], matrix, bias, lower)
            if self.normalized:
                torch.linalg.vector_norm(flat[rows], dim=1, keepdim=True, out=norms[rows])
                flat[rows] /= norms[rows]
        return y, norms

    def _group_features(self, x, group):
        rows = self.rows(group)
        features = x.new_empty(rows.stop - rows.start, self.width)
        for chunk in self.chunks(x, group):
            self.chunk_features(x[chunk], features[_within(self.rows(chunk), rows)])
        return features

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
        for outputs, columns in consecutive(matrices):
            product = sum(
                transposed_times(g[:, outputs], f[:, columns], lower)
                for g, f in zip(gradient.split(_PRODUCT_ROWS), features.split(_PRODUCT_ROWS), strict=True)
            )
            products.append(product.addr_(total[outputs], statistics.mean[columns], alpha=-1))
        return products

    def statistics_gradient(self, matrices, products, total, statistics, of_batch):
        """What the batch's own statistics add to the features' gradient: features·slope + shift, each (width,).

        With W' = W diag(r), the gradient of x̂ summed against x̂ is the column sums of W'·(its gradient).
        """
        slope, shift = torch.zeros_like(statistics.var), torch.zeros_like(statistics.var)
        if not (self.standardized and of_batch):
            return slope, shift
        for w, product, (outputs, columns) in zip(matrices, products, consecutive(matrices), strict=True):
            for w_rows, product_rows in zip(w.split(128), product.split(128), strict=True):  # in the cache
                slope[columns] += (w_rows * product_rows).sum(0)
            shift[columns] += total[outputs] @ w
        sum_over_ranks(slope, shift)
        slope = self.layout.tied(slope) * (-(self.scale(statistics) ** 2) / statistics.count)
        if self.standardized == "homogeneous":
            return slope, torch.zeros_like(shift)
        return slope, -shift / statistics.count - slope * statistics.mean

    def input_gradient(self, x, gradient, features, matrices, slope, shift, lower):
        """Gradient of x (B, M, N, p·C), a group of images at a time."""
        x_gradient = torch.empty_like(x)
        for group in self.groups(x):
            rows = self.rows(group)
            features_gradient = x.new_empty(rows.stop - rows.start, self.width)
            for matrix, (outputs, columns) in zip(matrices, consecutive(matrices), strict=True):
                product = times_transposed(gradient[rows, outputs], matrix.t(), shift[columns], lower)
                features_gradient[:, columns] = product
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
        statistics = None if std is not None and std.training else self._fixed_statistics(std, x)
        lower = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        with torch.autocast(x.device.type, enabled=False):
            x = self.maps.split(x.float()).contiguous()
            y, mean, var, count = _FusedBlock.apply(x, weight, self, statistics, lower)
        if statistics is None:
            std.update(*self.layout.to_channels(mean, var), int(count))
        return self.maps.join(y)

    def _fixed_statistics(self, std, x):
        """The running statistics of a Standardization as real columns; those that change nothing for None."""
        if std is not None:
            return Statistics(*self.layout.to_columns(std.mean, std.var))
        zero = torch.zeros(self.width, device=x.device)
        return Statistics(zero, zero + 1)

    @torch.no_grad()
    def columns_of(self, x):
        """Features before standardisation of x (B, M, N, p·C), as it computes with them: (B·M'·N', width) real."""
        return self.compute_features(self.maps.split(x).contiguous(), self._fixed_statistics(None, x))[0]

    def parts_of(self, columns):
        """Real and imaginary parts of columns, each with its order: channel d's real part is column order[d].

        The imaginary part is (None, None) for real features; it is that of the first channels, those of z.
        """
        places, block = self.layout.places(columns.device), self.layout.block
        if not self.skip:
            return (columns, places), (None, None)
        return (columns[:, : 2 * block], torch.cat([places, block + places])), (columns[:, 2 * block :], places)

    @torch.no_grad()
    def forward_from(self, columns, x, weight, std=None):
        """`forward` in evaluation mode, given the columns of x."""
        statistics = self._fixed_statistics(std, x)
        matrices = self.layout.fold(weight, self.scale(statistics))
        return self.maps.join(self.project(self.maps.split(x), columns, matrices, statistics, None)[0])

    @torch.no_grad()
    def features(self, x):
        """x (B, C, M, N) -> [φ, |ψ|] or [z, |z|] (B, D, M', N') in canonical channel order; no gradients."""
        columns = self.columns_of(to_planar(x))
        return self.layout.features_of(self.maps.join(columns.view(-1, *self.maps.out_shape, self.width)))
