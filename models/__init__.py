"""What a network is: no files, no command line, no printing."""


def build(config):
    """The network that a configuration describes, with random weights from torch's generator."""
    from models.config import ScatNetConfig

    if isinstance(config, ScatNetConfig):
        from models.scatnet import ScatNet

        return ScatNet(config)
    from models.standard import build_standard

    return build_standard(config)
