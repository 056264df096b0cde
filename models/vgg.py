"""VGG networks (Simonyan and Zisserman, 2015) with torchvision's parameter names, of any width and non-linearity."""

from torch import nn

from models.config import StandardConfig
from models.standard import batch_norm, in_order, initialize_convolutions, non_linearities

_WIDTHS = (64, 128, 256, 512, 512)  # a maximum over 2×2 pixels after the convolutions of each width
_HIDDEN = 4096
_POOLED = 7
VGGS = {
    "vgg11-custom": (1, 1, 2, 2, 2),
    "vgg13-custom": (2, 2, 2, 2, 2),
    "vgg16-custom": (2, 2, 3, 3, 3),
    "vgg19-custom": (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """(B, C, M, N) images, at least 32×32 -> (B, num_classes): without batch norm torchvision's `vgg11`, with "pre"
    its `vgg11_bn`. Batch norm is in the convolutional part only; the two hidden linear layers have dropout.

    Raises ValueError for images that are too small or a width that leaves no channel.
    """

    def __init__(self, config: StandardConfig):
        super().__init__()
        height, width = config.input.height, config.input.width
        smallest = 2 ** len(_WIDTHS)
        if min(height, width) < smallest:
            raise ValueError(f"{config.name} needs images of at least {smallest}×{smallest}, not {height}×{width}")
        layers, channels, make = [], config.input.channels, non_linearities(config)
        for outputs, depth in zip(_WIDTHS, VGGS[config.name]):
            outputs = config.scaled(outputs)
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=config.bias))
                layers.extend(in_order(config, batch_norm(config, outputs), make(outputs)))
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(_POOLED)
        self.classifier = _classifier(config, channels * _POOLED**2, make)
        initialize_convolutions(self)

    def forward(self, x):
        x = self.avgpool(self.features(x))  # (B, 512·width, 7, 7)
        return self.classifier(x.flatten(1))


def _classifier(config, inputs, make):
    """(B, inputs) -> (B, num_classes) through two hidden layers; weights of variance 1e−4, as torchvision's."""
    layers, hidden = [], config.scaled(_HIDDEN)
    for _ in range(2):
        layers.append(nn.Linear(inputs, hidden, bias=config.bias))
        layers.append(make(hidden))
        layers.append(nn.Dropout())
        inputs = hidden
    layers.append(nn.Linear(inputs, config.num_classes, bias=config.classifier_bias))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
