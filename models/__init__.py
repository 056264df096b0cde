"""What a network is: no files, no command line, no printing."""


def build(config):
    """The network that a configuration describes, with random weights from torch's generator.

    Raises ValueError as its class does.
    """
    from models.config import ScatNetConfig

    if isinstance(config, ScatNetConfig):
        from models.scatnet import ScatNet

        return ScatNet(config)
    from models.resnet import RESNETS, ResNet
    from models.standard import contiguous
    from models.torchvision_networks import torchvision_network
    from models.vgg import VGG, VGGS

    make = ResNet if config.name in RESNETS else VGG if config.name in VGGS else torchvision_network
    network = make(config)
    network.register_forward_pre_hook(contiguous)
    return network
