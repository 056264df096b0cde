"""The learned part of a block: a 1×1 convolution without bias (`P`, `Pr`, `Pc`)."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.config import BlockConfig
from models.names import IDENTITY
from models.standardization import single


def apply_weight(weight, x):
    """W (N, D) on every position of x (B, D, M, N'), real or complex each -> (B, N, M, N')."""
    if x.is_complex() and not weight.is_complex():
        return torch.complex(*(single(apply_weight(weight, part)) for part in (x.real, x.imag)))
    if weight.is_complex() and not x.is_complex():
        return torch.complex(*(single(apply_weight(part, x)) for part in (weight.real, weight.imag)))
    return F.conv2d(x, weight[:, :, None, None])


class Projection(nn.Module):
    """(B, D, M, N) -> (B, C, M, N): the module `name` of a block, with weights (C, D).

    The weights of "Pr" are real, those of "Pc" complex, those of "P" of the input's type; real weights act on the real
    and on the imaginary part of a complex input. A fixed basis (K, D) comes before the weights, then (C, K), if
    `config` has one. C = "id" keeps the input: the weights are a fixed identity.

    Raises ValueError if C is missing or a matrix of `config` does not fit.
    """

    def __init__(self, name, signal, config: BlockConfig):
        super().__init__()
        size, basis = getattr(config, f"{name}_size"), config.projection_basis
        if size is None:
            flag = "--L-proj-size" if name == "P" else f"--{name}-size"
            raise ValueError(f"the module {name!r} needs its number of channels ({flag})")
        if basis is not None and basis.shape[1] != signal.channels:
            raise ValueError(f"the fixed projection takes {basis.shape[1]} channels, not {signal.channels}")
        self.register_buffer("basis", basis, persistent=basis is not None)
        inputs = signal.channels if basis is None else len(basis)
        is_complex = name == "Pc" or (name == "P" and signal.complex)
        dtype, is_identity = torch.cfloat if is_complex else torch.float, size == IDENTITY
        weight = torch.eye(inputs, dtype=dtype) if is_identity else initial_weight(size, inputs, dtype, config)
        self.weight = nn.Parameter(weight, requires_grad=not (config.freeze_projection or is_identity))
        self.out = signal.with_(channels=len(weight), complex=signal.complex or is_complex)

    def forward(self, x):
        if self.basis is not None:
            x = apply_weight(self.basis, x)
        return apply_weight(self.weight, x)

    def extra_repr(self):
        rows, columns = self.weight.shape
        kind = "complex" if self.weight.is_complex() else "real"
        return f"{columns} -> {rows}, {kind}" + ("" if self.weight.requires_grad else ", frozen")


def initial_weight(rows, columns, dtype, config):
    """W (rows, columns) at the start: given, or Gaussian of given variances along the input, or the default."""
    if config.projection_initialization is not None:
        return _fitting(config.projection_initialization, (rows, columns), "initial weights").to(dtype)
    if config.projection_eigenvalues is not None:
        variances = _fitting(config.projection_eigenvalues, (columns,), "eigenvalues")
        return torch.randn(rows, columns, dtype=dtype) * variances.sqrt()
    return default_weight(rows, columns, dtype, config.orthogonal)


def default_weight(rows, columns, dtype, orthogonal):
    """Real weights (rows, columns) as `nn.Conv2d`'s; complex or orthogonal ones a uniformly drawn partial isometry."""
    if dtype.is_complex or orthogonal:
        u, _, vh = torch.linalg.svd(torch.randn(rows, columns, dtype=dtype), full_matrices=False)
        return u @ vh
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound)


def parseval_step(w, beta):
    """W <- (1 + β) W - β W Wᴴ W: towards a partial isometry."""
    w.copy_((1 + beta) * w - beta * (w @ w.mH @ w))


def quadrature_step(w, beta):
    """W <- W - β W Wᵀ W̄: real and imaginary parts of the rows towards quadrature."""
    w.copy_(w - beta * (w @ w.mT @ w.conj()))


def _fitting(tensor, shape, what):
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} of shape {tuple(tensor.shape)} do not fit: {shape} is needed")
    return tensor
