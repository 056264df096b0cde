"""torchvision's own networks, with random or trained weights."""

from dataclasses import fields
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import nn

from models.config import StandardConfig

_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")


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
    network = models.get_model(config.name, weights=None, num_classes=config.num_classes)
    if config.pretrained:
        weights = next(iter(models.get_model_weights(config.name)))
        classes, given = len(weights.meta["categories"]), config.num_classes
        if given != classes:
            raise ValueError(f"the trained weights of {config.name} are for {classes} classes, the data has {given}")
        network.load_state_dict(_download(weights))
    return network


def _download(weights):
    """The state dict torchvision publishes for `weights`, from torch's cache if it is there."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"no trained weights in {folder} and none from {weights.url} ({error}): put that file into that folder"
        ) from error
