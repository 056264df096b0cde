"""Matrix products by whatever is fastest: `torch.mm`, or on a CPU oneDNN's 1×1 convolutions."""

import torch
from torch.nn import functional as F

_SMALL_PRODUCT = 1 << 22  # multiply-adds; measured
_WIDE = 64  # columns; measured


def _convolves(x, multiply_adds):
    """Whether a product runs as a 1×1 convolution: oneDNN's are faster than `torch.mm` on many processors."""
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available() and multiply_adds > _SMALL_PRODUCT


def times_transposed(x, w, bias, lower):
    """x wᵀ + bias of x (n, D) and w (C, D) -> (n, C), in the type `lower` if it is not None."""
    if lower is not None:
        x, w = x.to(lower), w.to(lower)
        return (x @ w.t()).float().add_(bias)
    if not _convolves(x, x.numel() * len(w)):
        return torch.addmm(bias, x, w.t())
    return F.conv2d(_as_image(x), w[:, :, None, None], bias)[0, :, 0].t()


def transposed_times(g, x, lower):
    """gᵀ x of g (n, C) and x (n, D) -> (C, D), in the type `lower` if it is not None."""
    if lower is not None:
        return (g.to(lower).t() @ x.to(lower)).float()
    if not _convolves(x, x.numel() * g.shape[1]):
        return g.t() @ x
    shape = (g.shape[1], x.shape[1], 1, 1)
    return torch.nn.grad.conv2d_weight(_as_image(x), shape, _as_image(g))[:, :, 0, 0]


def times_batch(matrix, x):
    """A x_i of A (P, K) and x (batch, K, C) -> (batch, P, C)."""
    if x.shape[-1] >= _WIDE and _convolves(x, x.numel() * len(matrix)):
        return F.conv2d(x[:, :, None].contiguous(), matrix[:, :, None, None])[:, :, 0]
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


def _as_image(matrix):
    """(n, D) -> (1, D, 1, n), channels last in memory."""
    return matrix.contiguous()[None, None].permute(0, 3, 1, 2)
