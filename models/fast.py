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
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from models.matmul import times_transposed, transposed_times
from models.planar import ColumnLayout, consecutive, to_planar
from models.standardization import EPSILON, count_over_ranks, is_distributed, sum_over_ranks
from models.wavelet_maps import WaveletMaps

_CHUNK_BYTES = 4 << 20  # measured: wavelet coefficients of a chunk on a CPU
_CHUNK_BYTES_GPU = 1 << 30
_GROUP_ROWS = 2048  # measured: with fewer rows, reading the weights dominates the projection
_PRODUCT_ROWS = 16384  # on a CPU, bounds the copies of the features' columns that the weights' gradients need
_SMALLEST_MODULUS = 1e-18  # below it the modulus has no gradient


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of every real column of the features, and how many samples they are of."""

    mean: torch.Tensor
    var: torch.Tensor
    count: int | torch.Tensor = 0


class _FusedBlock(torch.autograd.Function):
    """x (B, M, N, p·C), W (C', D) real or complex -> y (B, M', N', q·C') and the features' statistics."""

    @staticmethod
    def forward(ctx, x, weight, block, statistics, lower):
        keep = any(ctx.needs_input_grad)
        ctx.block, ctx.of_batch, ctx.lower = block, statistics is None, lower
        features = None
        if keep or ctx.of_batch:
            features, statistics = block.compute_features(x, statistics)
        matrices = block.layout.fold(weight, block.scale(statistics))
        y, norms = block.project(x, features, matrices, statistics, lower)
        if keep:
            ctx.statistics = statistics
            ctx.save_for_backward(x, weight, features, y, norms, *matrices)
        count = torch.as_tensor(statistics.count)
        ctx.mark_non_differentiable(statistics.mean, statistics.var, count)
        return y, statistics.mean, statistics.var, count

    @staticmethod
    def backward(ctx, gradient, *_statistics):
        x, weight, features, y, norms, *matrices = ctx.saved_tensors
        block, statistics = ctx.block, ctx.statistics
        gradient = block.undo_normalization(gradient, y, norms)
        total = gradient.sum(0)
        products = block.weight_products(gradient, features, total, matrices, statistics, ctx.lower)
        weight_gradient = x_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = block.layout.unfold(products, weight, block.scale(statistics))
        if ctx.needs_input_grad[0]:
            slope, shift = block.statistics_gradient(matrices, products, total, statistics, ctx.of_batch)
            x_gradient = block.input_gradient(x, gradient, features, matrices, slope, shift, ctx.lower)
        return x_gradient, weight_gradient, None, None, None


def _cut(whole, size):
    """Cut a slice into slices of at most `size` (at least 1)."""
    size = max(1, size)
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


class FusedBlock(nn.Module):
    """What a block of the pattern `Fw [rho] [Std] P|Pr|Pc [N]` computes, as one operation, for inputs of type `signal`.

    `skip`: the features are [z, |z|] instead of [φ, |ψ|]; `standardized`, `normalized`: there is a Standardization
    ("homogeneous" for one that keeps the mean at 0), a Normalization.
    """

    def __init__(self, transform, signal, skip, standardized, normalized):
        super().__init__()
        self.skip, self.standardized, self.normalized = skip, standardized, normalized
        self.layout = ColumnLayout(signal.channels, transform.number, skip)
        bank, shape, parts = transform.bank.cpu().numpy(), (signal.height, signal.width), 2 if signal.complex else 1
        self.maps = WaveletMaps(bank, shape, transform.subsample, parts, phi_parts=2 if skip else 1)

    # -- the steps of the operation -------------------------------------------------------------------------------

    def chunks(self, x, images=None):
        """Cut a slice of the batch (all of it) so that the wavelet coefficients fit the processor's cache."""
        per_image = 4 * self.layout.channels * self.maps.planes * math.prod(self.maps.out_shape)
        return _cut(images or slice(0, len(x)), (_CHUNK_BYTES_GPU if x.is_cuda else _CHUNK_BYTES) // per_image)

    def groups(self, x):
        """Cut the batch so that the projection's products have enough rows."""
        return _cut(slice(0, len(x)), len(x) if x.is_cuda else -(-_GROUP_ROWS // math.prod(self.maps.out_shape)))

    def rows(self, images, first=0):
        """The rows of the features that belong to a slice of the batch, counted from those of the image `first`."""
        positions = math.prod(self.maps.out_shape)
        return slice((images.start - first) * positions, (images.stop - first) * positions)

    def in_planes(self, features):
        """Features (P, width) as (P, 1 or 3 blocks, 1 + n, C)."""
        return features.view(len(features), -1, 1 + self.layout.filters, self.layout.channels)

    def chunk_features(self, x, out):
        """Write the features of a chunk of images to `out` (P, width)."""
        out, groups = self.in_planes(out), list(zip(self.maps(x), self.maps.places, strict=True))
        if not self.skip:
            out[:, 0, 0] = groups.pop(0)[0][:, 0, 0]  # φ
        for z, place in groups:
            if self.skip:
                out[:, 0::2, place] = z
            squared = torch.mul(z[:, 0], z[:, 0]).addcmul_(z[:, 1], z[:, 1])
            torch.sqrt(squared, out=out[:, out.shape[1] // 2, place])

    def coefficients_gradient(self, x, features, gradient):
        """Gradients of the wavelet coefficients of a chunk from those of its features (P, width), overwritten."""
        features, gradient = self.in_planes(features), self.in_planes(gradient)
        if self.skip:  # the coefficients are among the features
            ratio = torch.div(gradient[:, 1:2], features[:, 1:2].clamp_min(_SMALLEST_MODULUS))
            parts = gradient[:, 0::2], ratio, features[:, 0::2]
            return [torch.addcmul(*(part[:, :, place] for part in parts)).contiguous() for place in self.maps.places]
        phi, *psi = self.maps(x)
        phi[:, 0] = gradient[:, 0, :1]
        ratio = gradient.div_(features.clamp_min(_SMALLEST_MODULUS))
        return [phi] + [z.mul_(ratio[:, :, place]) for z, place in zip(psi, self.maps.places[1:], strict=True)]

    def compute_features(self, x, statistics):
        """Features (B·M'·N', width) and their statistics: of this batch if none are given."""
        features = x.new_empty(self.rows(slice(0, len(x))).stop, self.layout.width)
        moments = x.new_zeros(2, self.layout.width, dtype=torch.float if x.device.type == "mps" else torch.double)
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
        y = x.new_empty(len(x), *self.maps.out_shape, sum(map(len, matrices)))
        flat = y.view(-1, y.shape[-1])
        norms = x.new_empty(len(flat), 1) if self.normalized else None
        for group in self.groups(x):
            rows = self.rows(group)
            part = self.compute_features(x[group], statistics)[0] if features is None else features[rows]
            for matrix, bias, (outputs, columns) in zip(matrices, biases, slices, strict=True):
                flat[rows, outputs] = times_transposed(part[:, columns], matrix, bias, lower)
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
        size = len(gradient) if gradient.is_cuda else _PRODUCT_ROWS
        pairs = list(zip(gradient.split(size), features.split(size), strict=True))
        for outputs, columns in consecutive(matrices):
            product = sum(transposed_times(g[:, outputs], f[:, columns], lower) for g, f in pairs)
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
            size = len(w) if w.is_cuda else 128  # in the processor's cache
            for w_rows, product_rows in zip(w.split(size), product.split(size), strict=True):
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
            group_gradient = x.new_empty(rows.stop - rows.start, self.layout.width)
            for matrix, (outputs, columns) in zip(matrices, consecutive(matrices), strict=True):
                product = times_transposed(gradient[rows, outputs], matrix.t(), shift[columns], lower)
                group_gradient[:, columns] = product
            for chunk in self.chunks(x, group):
                part, part_gradient = features[self.rows(chunk)], group_gradient[self.rows(chunk, group.start)]
                part_gradient.addcmul_(part, slope)
                self.maps.adjoint(self.coefficients_gradient(x[chunk], part, part_gradient), x_gradient[chunk])
        return x_gradient

    # -- what a block calls ---------------------------------------------------------------------------------------

    def forward(self, x, weight, std=None):
        """x (B, M, N, p·C), W (C', D) in canonical order -> (B, M', N', q·C'); moves `std`'s statistics in training."""
        statistics = None if std is not None and std.training else self._fixed_statistics(std, x)
        kind, lower = x.device.type, None
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            lower = torch.get_autocast_dtype(kind)
        with nullcontext() if lower is None else torch.autocast(kind, enabled=False):
            x = self.maps.split(x.float()).contiguous()
            y, mean, var, count = _FusedBlock.apply(x, weight, self, statistics, lower)
        if statistics is None:
            count = count if is_distributed() else count.item()
            std.update(*self.layout.to_channels(mean, var), count)
        return self.maps.join(y)

    def _fixed_statistics(self, std, x):
        """The running statistics of a Standardization as real columns; those that change nothing for None."""
        if std is not None:
            return Statistics(*self.layout.to_columns(std.mean, std.var))
        zero = torch.zeros(self.layout.width, device=x.device)
        return Statistics(zero, zero + 1)

    @torch.no_grad()
    def columns_of(self, x):
        """Features before standardisation of x (B, M, N, p·C), as it computes with them: (B·M'·N', width) real."""
        return self.compute_features(self.maps.split(x).contiguous(), self._fixed_statistics(None, x))[0]

    @torch.no_grad()
    def forward_from(self, columns, x, weight, std=None):
        """`forward` in evaluation mode, given the columns of x."""
        statistics = self._fixed_statistics(std, x)
        matrices = self.layout.fold(weight, self.scale(statistics))
        return self.maps.join(self.project(self.maps.split(x), columns, matrices, statistics, None)[0])

    @torch.no_grad()
    def features(self, x):
        """x (B, C, M, N) -> [φ, |ψ|] or [z, |z|] (B, D, M', N') in canonical channel order; no gradients."""
        columns = self.columns_of(to_planar(x)).view(-1, *self.maps.out_shape, self.layout.width)
        return self.layout.features_of(self.maps.join(columns))
