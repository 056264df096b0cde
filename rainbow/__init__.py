"""The analysis of 'A Rainbow in Deep Network Black Boxes' for any `torch.nn.Module`: `Rainbow.fit` is where to begin.

`register` teaches it layers, normalisations and networks that it does not know.
"""

from rainbow.alignment import Alignment, MeanNetwork
from rainbow.analysis import Rainbow
from rainbow.covariance import WeightCovariance
from rainbow.errors import RainbowError
from rainbow.layers import Layer
from rainbow.network import weight_layers
from rainbow.norms import Norm
from rainbow.program import Architecture, Step
from rainbow.registry import register
from rainbow.sampling import RainbowSampler

__all__ = [
    "Alignment",
    "Architecture",
    "Layer",
    "MeanNetwork",
    "Norm",
    "Rainbow",
    "RainbowError",
    "RainbowSampler",
    "Step",
    "WeightCovariance",
    "register",
    "weight_layers",
]
