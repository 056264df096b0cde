"""What the standard networks share: their description, non-linearity and batch norm; torchvision's own networks."""

from dataclasses import dataclass, fields
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import nn

from .signal import Signal

BATCH_NORMS = ("none", "pre", "post")
STANDARD_NON_LINEARITIES = ("relu", "abs", "absdead", "thresh", "tanh", "sigmoid", "pow", "powfixed")
_WITH_BIAS = ("absdead", "thresh", "tanh", "sigmoid", "pow", "powfixed")
_WITH_GAIN = ("tanh", "sigmoid", "pow")
_TINY = 1e-6
_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")


def build_standard(config: "StandardConfig") -> nn.Module:
    """The network of `config`, with random weights from torch's generator. Raises ValueError as its class does."""
    from .resnet import RESNETS, ResNet
    from .vgg import VGG, VGGS

    if config.name in RESNETS:
        return ResNet(config)
    if config.name in VGGS:
        return VGG(config)
    return torchvision_network(config)


@dataclass(frozen=True)
class StandardConfig:
    """A standard network: `name` is "resnet18-custom", "vgg11-custom", … or one of torchvision's ("resnet18").

    width: every number of channels w becomes int(width·w). batch_norm: "none", "pre" (before the non-linearity, as
    torchvision) or "post" (after it). bias: affine batch norm and biases of the layers before the last;
    classifier_bias: that of the last. pretrained: torchvision's ImageNet weights (torchvision's own networks only).
    Raises ValueError for values outside these.
    """

    name: str
    num_classes: int
    input: Signal
    width: float = 1.0
    batch_norm: str = "pre"
    bias: bool = True
    classifier_bias: bool = True
    non_linearity: str = "relu"
    pretrained: bool = False

    def __post_init__(self):
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(f"unknown batch norm {self.batch_norm!r}: choose among {', '.join(BATCH_NORMS)}")
        if self.non_linearity not in STANDARD_NON_LINEARITIES:
            names = ", ".join(STANDARD_NON_LINEARITIES)
            raise ValueError(f"unknown non-linearity {self.non_linearity!r}: choose among {names}")
        if self.num_classes < 1:
            raise ValueError(f"a network needs at least one class, not {self.num_classes}")
        if self.input.complex:
            raise ValueError(f"{self.name} needs real images, not {self.input}")
        if self.pretrained and self.name.endswith("-custom"):
            plain = self.name.removesuffix("-custom")
            raise ValueError(f"only torchvision's own networks have trained weights: {plain}, not {self.name}")

    def scaled(self, channels: int) -> int:
        """int(width·channels); raises ValueError where nothing is left."""
        scaled = int(self.width * channels)
        if scaled < 1:
            raise ValueError(f"width scaling {self.width:g} leaves none of {channels} channels of {self.name}")
        return scaled


class StandardNonLinearity(nn.Module):
    """Pointwise function of real (B, C, M, N) or (B, C), with gain g and bias b learned per channel where it has them.

    relu: max(x, 0); abs: |x|; absdead: max(|x| − b, 0), abs with a dead zone; thresh: sign(x) max(|x| − b, 0), the
    soft threshold; tanh: tanh(g x + b); sigmoid: 1 / (1 + exp(−g x − b)); pow: sign(x) t / (1 + t) with
    t = e^b |x|^g; powfixed: pow with g = 1. They start at g = 1, b = 0. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str, channels: int):
        super().__init__()
        if name not in STANDARD_NON_LINEARITIES:
            names = ", ".join(STANDARD_NON_LINEARITIES)
            raise ValueError(f"unknown non-linearity {name!r}: choose among {names}")
        self.name = name
        self.gain = nn.Parameter(torch.ones(channels)) if name in _WITH_GAIN else None
        self.bias = nn.Parameter(torch.zeros(channels)) if name in _WITH_BIAS else None

    def forward(self, x):
        if self.name == "relu":
            return x.relu()
        if self.name == "abs":
            return x.abs()
        shape = (-1,) + (1,) * (x.dim() - 2)
        bias = self.bias.view(shape)  # (C, 1, 1) or (C,)
        gain = 1.0 if self.gain is None else self.gain.view(shape)
        if self.name == "absdead":
            return (x.abs() - bias).relu()
        if self.name == "thresh":
            return x.sign() * (x.abs() - bias).relu()
        if self.name == "tanh":
            return torch.tanh(gain * x + bias)
        if self.name == "sigmoid":
            return torch.sigmoid(gain * x + bias)
        power = bias.exp() * (x.abs() + _TINY) ** gain
        return x.sign() * power / (1 + power)

    def extra_repr(self):
        return self.name


def batch_norm(config: StandardConfig, channels: int) -> nn.Module:
    """The batch norm of `channels` channels, affine with `config.bias`; the identity with `config.batch_norm` none."""
    if config.batch_norm == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels, affine=config.bias)


def in_order(config: StandardConfig, norm, non_linearity) -> tuple:
    """The two modules (or their names) as `config.batch_norm` orders them; without batch norm only the second."""
    orders = {"none": (non_linearity,), "pre": (norm, non_linearity), "post": (non_linearity, norm)}
    return orders[config.batch_norm]


def initialize_convolutions(network: nn.Module):
    """Kaiming-normal (fan-out, relu) weights and zero biases for every convolution of `network`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def torchvision_network(config: StandardConfig) -> nn.Module:
    """torchvision's own network of that name, with its first published ImageNet weights if `config.pretrained`.

    Raises ValueError for a name torchvision does not have, options that only custom networks have, images that are
    not RGB, other than 1000 classes with trained weights, or weights that cannot be downloaded.
    """
    from torchvision import models  # not at the top: the custom networks work without it

    names = set(models.list_models(module=models)) - set(_AUXILIARY_OUTPUTS)
    if config.name not in names:
        raise ValueError(
            f"unknown network {config.name!r}: choose resnet18-custom (or 34, 50, 101, 152), vgg11-custom (or 13, 16, "
            "19) or a network of torchvision, such as resnet18"
        )
    plain = StandardConfig(config.name, config.num_classes, config.input, pretrained=config.pretrained)
    for field in fields(StandardConfig):
        if getattr(config, field.name) != getattr(plain, field.name):
            raise ValueError(f"{config.name} is torchvision's own network, whose {field.name} is fixed")
    if config.input.channels != 3:
        raise ValueError(f"torchvision's {config.name} needs images of 3 channels, not {config.input.channels}")
    if not config.pretrained:
        return models.get_model(config.name, weights=None, num_classes=config.num_classes)
    weights = next(iter(models.get_model_weights(config.name)))
    classes = len(weights.meta["categories"])
    if config.num_classes != classes:
        raise ValueError(
            f"the trained weights of {config.name} are for {classes} classes, the data has {config.num_classes}"
        )
    network = models.get_model(config.name, weights=None, num_classes=classes)
    network.load_state_dict(_download(weights))
    return network


def _download(weights):
    """The state dict torchvision publishes for `weights`, from torch's cache where it is there already."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"no trained weights in {folder} and none from {weights.url} ({error}): put that file into that folder"
        ) from error
