"""The learned part of a block: a 1×1 convolution without bias (`P`, `Pr`, `Pc`)."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def apply_weight(weight, x):
    """W (N, D) on every position of x (B, D, M, N'), real or complex each -> (B, N, M, N')."""
    if x.is_complex() and not weight.is_complex():
        return torch.complex(apply_weight(weight, x.real), apply_weight(weight, x.imag))
    if weight.is_complex() and not x.is_complex():
        return torch.complex(apply_weight(weight.real, x), apply_weight(weight.imag, x))
    return F.conv2d(x, weight[:, :, None, None])


class Projection(nn.Module):
    """(B, D, M, N) -> (B, C, M, N), weights of shape (C, D), real or complex.

    Real weights on a complex input act on real and imaginary parts alike. Real weights start as `nn.Conv2d`'s,
    complex ones as the unitary factor of a complex Gaussian matrix; `orthogonal` starts either as a partial isometry.

    Args:
        signal: type of the input.
        channels: C; None keeps the input as it is: W is a fixed identity.
        is_complex: whether the weights are complex.
        basis: (K, D) fixed projection applied before the weights, which are then (C, K); None for none.
        eigenvalues: (K,) variances of Gaussian weights along the input directions; None for the default start.
        initialization: (C, K) weights to start from; None for the default start.
        frozen: the weights are not learned.

    Raises:
        ValueError: a shape does not fit.
    """

    def __init__(
        self,
        signal,
        channels,
        is_complex=False,
        *,
        basis=None,
        eigenvalues=None,
        initialization=None,
        frozen=False,
        orthogonal=False,
    ):
        super().__init__()
        if basis is not None and basis.shape[1] != signal.channels:
            raise ValueError(f"the fixed projection takes {basis.shape[1]} channels, not {signal.channels}")
        self.register_buffer("basis", basis, persistent=basis is not None)
        inputs = signal.channels if basis is None else len(basis)
        identity = channels is None
        channels = inputs if identity else channels
        dtype = torch.cfloat if is_complex else torch.float
        if identity:
            weight = torch.eye(inputs, dtype=dtype)
        elif initialization is not None:
            weight = self._checked(initialization, (channels, inputs), "initial weights").to(dtype)
        elif eigenvalues is not None:
            variances = self._checked(eigenvalues, (inputs,), "eigenvalues")
            weight = torch.randn(channels, inputs, dtype=dtype) * variances.sqrt()
        elif is_complex or orthogonal:
            weight = partial_isometry(channels, inputs, dtype)
        else:
            bound = 1 / math.sqrt(inputs)
            weight = torch.empty(channels, inputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight, requires_grad=not (frozen or identity))
        self.orthogonal = orthogonal
        self.out = signal.with_(channels=channels, complex=signal.complex or is_complex)

    @staticmethod
    def _checked(tensor, shape, what):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{what} of shape {tuple(tensor.shape)} do not fit: {shape} is needed")
        return tensor

    def forward(self, x):
        if self.basis is not None:
            x = apply_weight(self.basis, x)
        return apply_weight(self.weight, x)

    @torch.no_grad()
    def parseval_step(self, beta):
        """W <- (1 + β) W - β W Wᴴ W: towards a partial isometry."""
        w = self.weight
        w.copy_((1 + beta) * w - beta * (w @ w.mH @ w))

    @torch.no_grad()
    def quadrature_step(self, beta):
        """W <- W - β W Wᵀ W̄: real and imaginary parts of the rows towards quadrature."""
        w = self.weight
        w.copy_(w - beta * (w @ w.mT @ w.conj()))

    def extra_repr(self):
        rows, columns = self.weight.shape
        kind = "complex" if self.weight.is_complex() else "real"
        return f"{columns} -> {rows}, {kind}" + ("" if self.weight.requires_grad else ", frozen")


def partial_isometry(rows, columns, dtype):
    """The polar factor of a Gaussian matrix, (rows, columns): orthonormal rows or columns, uniformly drawn."""
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, dtype=dtype), full_matrices=False)
    return u @ vh
