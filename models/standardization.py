"""Standardisation of every channel to mean 0 and variance 1 (`Std`)."""

import torch
import torch.distributed as dist
from torch import nn

EPSILON = 1e-5
MOMENTUM = 0.1


def sum_over_ranks(*tensors):
    """Sum each tensor over all processes of a distributed training, in place and without gradients."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def count_over_ranks(count, device):
    """Sum a number over all processes of a distributed training."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    (total,) = sum_over_ranks(torch.tensor(count, device=device))
    return int(total)


class _SumOverRanks(torch.autograd.Function):
    """Differentiable sum over processes: the gradient of a sum is summed over processes too."""

    @staticmethod
    def forward(ctx, tensor):
        (total,) = sum_over_ranks(tensor.clone())
        return total

    @staticmethod
    def backward(ctx, gradient):
        (total,) = sum_over_ranks(gradient.clone())
        return total


class Standardization(nn.Module):
    """(B, C, M, N) real or complex -> same, with running mean and variance over batch and space, no affine map.

    A complex input has a complex mean and the real variance E|x - m|². In training the biased batch variance
    normalises and the unbiased one is stored (momentum 0.1, ε = 1e-5). `homogeneous` keeps the mean at 0.
    In a distributed training the statistics are those of the batches of all processes together.
    """

    def __init__(self, signal, homogeneous=False):
        super().__init__()
        self.out = signal
        self.homogeneous = homogeneous
        dtype = torch.cfloat if signal.complex else torch.float
        self.register_buffer("mean", torch.zeros(signal.channels, dtype=dtype))
        self.register_buffer("var", torch.ones(signal.channels))

    def forward(self, x):
        mean, var = self.batch_statistics(x) if self.training else (self.mean, self.var)
        scale = torch.rsqrt(var + EPSILON)
        return (x - mean[:, None, None]) * scale[:, None, None]

    def batch_statistics(self, x):
        """Mean (C,) and biased variance (C,) of a batch; updates the running ones."""
        dims = (0, 2, 3)
        count = count_over_ranks(x.numel() // x.shape[1], x.device)
        if self.homogeneous:
            mean = torch.zeros_like(self.mean)
        else:
            mean = _SumOverRanks.apply(x.sum(dims)) / count
        centred = x - mean[:, None, None]
        energy = centred.real**2 + centred.imag**2 if x.is_complex() else centred**2
        var = _SumOverRanks.apply(energy.sum(dims)) / count
        self.update(mean, var, count)
        return mean, var

    @torch.no_grad()
    def update(self, mean, var, count):
        """Move the running statistics towards a batch's mean and biased variance over `count` samples."""
        self.mean.lerp_(mean, MOMENTUM)
        self.var.lerp_(var * (count / max(count - 1, 1)), MOMENTUM)

    def extra_repr(self):
        return f"{self.out.channels}" + (", homogeneous" if self.homogeneous else "")


class Normalization(nn.Module):
    """Divides (B, C, M, N) by its Euclidean norm over channels at each position (`N`; no ε, as in the paper)."""

    def __init__(self, signal):
        super().__init__()
        self.out = signal

    def forward(self, x):
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all processes of a distributed training together."""

    def forward(self, x):
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (self.training and distributed):
            return super().forward(x)
        count = count_over_ranks(x.numel() // x.shape[1], x.device)
        mean = _SumOverRanks.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = _SumOverRanks.apply((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        x = centred * torch.rsqrt(var + self.eps)[:, None, None]
        return x if self.weight is None else x * self.weight[:, None, None] + self.bias[:, None, None]
