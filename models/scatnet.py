"""Learned scattering networks: blocks, then a classifier."""

import torch
from torch import nn

from models.block import Block
from models.classifier import Classifier
from models.config import ScatNetConfig
from models.frame import Frame
from models.planar import from_planar, to_planar
from models.projection import Projection, apply_weight, parseval_step, quadrature_step
from models.standardization import single

RGB_TO_YUV = ((0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001))


class MixInput(nn.Module):
    """A 1×1 convolution of the input channels, learned, or fixed to RGB -> YUV; (B, C, M, N) -> same."""

    def __init__(self, signal, yuv=False):
        super().__init__()
        if yuv and signal.channels != 3:
            raise ValueError(f"--yuv needs 3 colour channels, but the images have {signal.channels}")
        start = torch.tensor(RGB_TO_YUV) if yuv else torch.eye(signal.channels)
        self.weight = nn.Parameter(start, requires_grad=not yuv)

    def forward(self, x):
        return single(apply_weight(self.weight, x))


class ScatNet(nn.Module):
    """(B, C, M, N) float images -> (B, classes) scores.

    Raises:
        ValueError: the blocks do not fit the images or one another; the message names the block.
    """

    def __init__(self, config: ScatNetConfig):
        super().__init__()
        self.config = config
        signal = config.input
        self.mix = MixInput(signal, config.yuv) if config.mix_input or config.yuv else nn.Identity()
        self.blocks = nn.ModuleList()
        for index, block_config in enumerate(config.blocks, start=1):
            try:
                self.blocks.append(Block(signal, block_config))
            except ValueError as error:
                raise ValueError(f"block {index} of {len(config.blocks)}: {error}") from None
            signal = self.blocks[-1].out
        self.classifier = Classifier(signal, config)

    def forward(self, x):
        x = self.mix(x)
        if all(block.runs_fused(x.dtype) for block in self.blocks):
            x = to_planar(x)
            for block in self.blocks:
                x = block.forward_planar(x)
            return self.classifier(from_planar(x, 2 if block.out.complex else 1))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)

    def projections(self):
        """All projections, in the order of the blocks."""
        return [module for module in self.blocks.modules() if isinstance(module, Projection)]

    def regularized(self):
        """The learned weights that the chosen regularisation is for: those of projections and frames."""
        if self.config.regularization is None:
            return []
        weights = [projection.weight for projection in self.projections()]
        weights += [m.frame for m in self.modules() if isinstance(m, Frame)]
        return [w for w in weights if w.requires_grad]

    def parameter_groups(self, weight_decay):
        """Parameters for an optimiser: regularised weights have no weight decay."""
        free = {id(w) for w in self.regularized()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in free], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in free], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def after_step(self):
        """What follows every optimiser step: norms of frames, and the chosen regularisation."""
        for module in self.modules():
            if isinstance(module, Frame):
                module.normalize()
        step = parseval_step if self.config.regularization == "parseval" else quadrature_step
        for weight in self.regularized():
            step(weight, self.config.beta)
