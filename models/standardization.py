"""Standardisation of every channel to mean 0 and variance 1 (`Std`), and batch norm, over all processes together."""

import torch
import torch.distributed as dist
from torch import nn

EPSILON = 1e-5
MOMENTUM = 0.1


def is_distributed():
    """Whether this process is one of several in a distributed training."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(*tensors):
    """Sum each tensor over all processes of a distributed training, in place and without gradients."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def count_over_ranks(count, device):
    """The sum of a number over all processes; among several, a tensor on `device`, which the host need not wait for."""
    if not is_distributed():
        return count
    dtype = torch.float if device.type == "mps" else torch.double
    (total,) = sum_over_ranks(torch.full((), count, dtype=dtype, device=device))
    return total


def single(x):
    """x in single precision at least: autocast hands over bfloat16, which no complex numbers are made of."""
    return x.float() if x.dtype in (torch.bfloat16, torch.half) else x


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


def centre(x, zero_mean=False):
    """Subtract from x (B, C, M, N), real or complex, the mean of its channels over the batches of all processes.

    Returns the centred x, the mean (C,), the biased variance E|x - m|² (C,) and the count of samples, all in float32
    at least. With `zero_mean` nothing is subtracted.
    """
    x = single(x)
    count = count_over_ranks(x.numel() // x.shape[1], x.device)
    mean = x.new_zeros(x.shape[1]) if zero_mean else _SumOverRanks.apply(x.sum((0, 2, 3))) / count
    centred = x - mean[:, None, None]
    energy = centred.real**2 + centred.imag**2 if x.is_complex() else centred**2
    return centred, mean, _SumOverRanks.apply(energy.sum((0, 2, 3))) / count, count


@torch.no_grad()
def move_statistics(running_mean, running_var, mean, var, count, momentum=MOMENTUM):
    """Move running statistics towards a batch's mean and unbiased variance; `var` is the biased one, of `count`."""
    others = (count - 1).clamp(min=1) if torch.is_tensor(count) else max(count - 1, 1)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (count / others), momentum)


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
        if not self.training:
            return (x - self.mean[:, None, None]) * torch.rsqrt(self.var + EPSILON)[:, None, None]
        centred, mean, var, count = centre(x, self.homogeneous)
        self.update(mean, var, count)
        return centred * torch.rsqrt(var + EPSILON)[:, None, None]

    def update(self, mean, var, count):
        """Move the running statistics towards a batch's mean and biased variance over `count` samples."""
        move_statistics(self.mean, self.var, mean, var, count)

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
        if not (self.training and is_distributed()):
            return super().forward(x)
        centred, mean, var, count = centre(x)
        self.num_batches_tracked += 1
        move_statistics(self.running_mean, self.running_var, mean, var, count, self.momentum)
        y = centred * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)
