"""From the last feature map to class scores."""

import torch
from torch import nn

from models.standardization import SharedBatchNorm2d


def complex_to_real(x):
    """(B, C, M, N) complex -> (B, 2C, M, N) real: real and imaginary part of each channel in turn."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(1, 2)


def real_to_complex(x):
    """The inverse of `complex_to_real`: (B, 2C, M, N) real -> (B, C, M, N) complex."""
    return torch.complex(x[:, 0::2], x[:, 1::2])


class Classifier(nn.Module):
    """(B, C, M, N) real or complex -> (B, classes): batch norm, optional global average, linear.

    `batch_norm`: "affine", "std" (no affine map) or "none".
    """

    def __init__(self, signal, classes, batch_norm="affine", bias=True, average=False):
        super().__init__()
        channels = signal.real_channels
        self.bn = nn.Identity() if batch_norm == "none" else SharedBatchNorm2d(channels, affine=batch_norm == "affine")
        self.average = average
        positions = 1 if average else signal.height * signal.width
        self.linear = nn.Linear(channels * positions, classes, bias)

    def forward(self, x):
        if x.is_complex():
            x = complex_to_real(x)  # (B, 2C, M, N)
        x = self.bn(x)
        if self.average:
            x = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return self.linear(x.flatten(1))
