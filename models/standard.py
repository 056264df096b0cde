"""The standard networks by name: ResNets and VGGs of any width, torchvision's own."""

from torch import nn

from models.config import StandardConfig
from models.resnet import RESNETS, ResNet
from models.torchvision_networks import torchvision_network
from models.vgg import VGG, VGGS


def build_standard(config: StandardConfig) -> nn.Module:
    """The network of `config`, with random weights from torch's generator. Raises ValueError as its class does."""
    if config.name in RESNETS:
        return ResNet(config)
    if config.name in VGGS:
        return VGG(config)
    return torchvision_network(config)
