"""ResNets (He et al., 2016) with torchvision's parameter names, of any width, batch norm and non-linearity."""

from torch import nn

from models.config import StandardConfig
from models.standard import batch_norm, in_order, initialize_convolutions, non_linearities

_BASIC, _BOTTLENECK = 1, 4  # the output channels of a block, relative to its width
RESNETS = {
    "resnet18-custom": (_BASIC, (2, 2, 2, 2)),
    "resnet34-custom": (_BASIC, (3, 4, 6, 3)),
    "resnet50-custom": (_BOTTLENECK, (3, 4, 6, 3)),
    "resnet101-custom": (_BOTTLENECK, (3, 4, 23, 3)),
    "resnet152-custom": (_BOTTLENECK, (3, 8, 36, 3)),
}


class ResidualBlock(nn.Module):
    """(B, channels, M, N) -> (B, expansion·width, M/stride, N/stride): two 3×3 convolutions (expansion 1), or 1×1,
    3×3, 1×1 (expansion 4), and a shortcut, projected by a 1×1 convolution where the shape changes.

    The last non-linearity follows the sum; the last batch norm precedes the sum ("pre") or follows that non-linearity
    ("post", where the projection of the shortcut has none). `make`: makes the next non-linearity, of so many channels.
    """

    def __init__(self, config: StandardConfig, make, channels: int, width: int, expansion: int, stride: int):
        super().__init__()
        out = expansion * width
        layers = [(width, 3, stride), (out, 3, 1)]
        if expansion == _BOTTLENECK:
            layers = [(width, 1, 1), (width, 3, stride), (out, 1, 1)]
        self.post = config.batch_norm == "post"
        self.depth = len(layers)
        inputs = channels
        for i, (outputs, size, step) in enumerate(layers, 1):
            self.add_module(f"conv{i}", _convolution(config, inputs, outputs, size, step))
            self.add_module(f"bn{i}", batch_norm(config, outputs))
            self.add_module(f"non_linearity{i}", make(outputs))
            inputs = outputs
        self.downsample = None
        if stride != 1 or channels != out:
            norm = [batch_norm(config, out)] if config.batch_norm == "pre" else []
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), *norm)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.depth + 1):
            norm, non_linearity = getattr(self, f"bn{i}"), getattr(self, f"non_linearity{i}")
            x = getattr(self, f"conv{i}")(x)
            if not self.post:
                x = norm(x)
            if i == self.depth:
                x = x + shortcut
            x = non_linearity(x)
            if self.post:
                x = norm(x)
        return x


class ResNet(nn.Module):
    """(B, C, M, N) images -> (B, num_classes). Raises ValueError for a width that leaves no channel."""

    def __init__(self, config: StandardConfig):
        super().__init__()
        (expansion, depths), make = RESNETS[config.name], non_linearities(config)
        channels = config.scaled(64)
        self.conv1 = _convolution(config, config.input.channels, channels, 7, 2)
        self.bn1 = batch_norm(config, channels)
        self.non_linearity = make(channels)
        self.stem = in_order(config, "bn1", "non_linearity")
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for stage, depth in enumerate(depths, 1):
            width = config.scaled(32 * 2**stage)
            blocks = []
            for b in range(depth):
                stride = 2 if stage > 1 and b == 0 else 1
                blocks.append(ResidualBlock(config, make, channels, width, expansion, stride))
                channels = expansion * width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, config.num_classes, bias=config.classifier_bias)
        initialize_convolutions(self)

    def forward(self, x):
        x = self.conv1(x)  # (B, 64·width, M/2, N/2)
        for name in self.stem:
            x = getattr(self, name)(x)
        x = self.maxpool(x)  # (B, 64·width, M/4, N/4)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(self.avgpool(x).flatten(1))


def _convolution(config, inputs, outputs, size, stride):
    """A convolution that keeps M and N up to its stride; biases only where no batch norm can carry them."""
    bias = config.bias and config.batch_norm == "none"
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
