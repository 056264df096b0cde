"""From the last feature map to class scores."""

import torch
from torch import nn
from torch.nn import functional as F

from models.config import ScatNetConfig
from models.standardization import SharedBatchNorm2d, single


def complex_to_real(x):
    """(B, C, M, N) complex -> (B, 2C, M, N) real: real and imaginary part of each channel in turn."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(1, 2)


def real_to_complex(x):
    """The inverse of `complex_to_real`: (B, 2C, M, N) real -> (B, C, M, N) complex."""
    x = single(x)
    return torch.complex(x[:, 0::2], x[:, 1::2])


class Classifier(nn.Module):
    """(B, C, M, N) real or complex -> (B, classes): batch norm, optional averages over space, linear.

    Batch norm "affine", "std" (no affine map) or "none"; averages over the whole map, or over windows of
    `average_kernel` pixels; the linear map may be the identity. Raises ValueError for what does not fit the maps.
    """

    def __init__(self, signal, config: ScatNetConfig):
        super().__init__()
        channels, kind = signal.real_channels, config.classifier_batch_norm
        self.bn = nn.Identity() if kind == "none" else SharedBatchNorm2d(channels, affine=kind == "affine")
        kernel, self.whole = config.average_kernel, config.average_pooling
        self.kernel = None if self.whole or kernel == 1 else kernel
        shape = (1, 1) if self.whole else (signal.height - kernel + 1, signal.width - kernel + 1)
        if min(shape) < 1:
            maps = f"{signal.height}×{signal.width}"
            raise ValueError(f"--avg-ker-size {kernel}: windows of {kernel}×{kernel} do not fit maps of {maps}")
        inputs, classes = channels * shape[0] * shape[1], config.num_classes
        if config.identity_classifier and inputs != classes:
            raise ValueError(f"--identity-classifier: {inputs} numbers leave the blocks for {classes} classes")
        linear = None if config.identity_classifier else nn.Linear(inputs, classes, config.classifier_bias)
        self.linear = linear or nn.Identity()

    @property
    def averages(self):
        """Whether anything lies between batch norm and the linear layer."""
        return self.whole or self.kernel is not None

    def forward(self, x):
        if x.is_complex():
            x = complex_to_real(x)  # (B, 2C, M, N)
        x = self.bn(x)
        if self.whole:
            x = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        elif self.kernel is not None:
            x = F.avg_pool2d(x, self.kernel, stride=1)
        return self.linear(x.flatten(1))
