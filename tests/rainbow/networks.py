"""Small networks and images that the tests of the analysis share."""

import torch
from torch import nn
from torch.nn import functional as F

from models import build
from models.config import BlockConfig, ScatNetConfig, StandardConfig
from models.scatnet import ScatNet
from models.signal import Signal


def batches(count=4, size=32, shape=(2, 8, 8), seed=0):
    """Random inputs, those of three axes smooth; three classes by the mean of the first channel."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 3:
        images = torch.randn(count * size, shape[0], shape[1] // 2, shape[2] // 2, generator=generator)
        images = F.interpolate(images, size=shape[1:], mode="bilinear")
    else:
        images = torch.randn(count * size, *shape, generator=generator)
    labels = images[:, :1].flatten(1).mean(1).argsort().argsort() * 3 // len(images)
    return list(zip(images.split(size), labels.split(size)))


def mlp(seed=0, widths=(24, 12), inputs=128, bias=True, non_linearity=nn.ReLU):
    """Linear layers "1", "3", ... after a flattening."""
    torch.manual_seed(seed)
    modules, sizes = [nn.Flatten()], [inputs, *widths]
    for channels, neurons in zip(sizes, widths):
        modules += [nn.Linear(channels, neurons, bias=bias), non_linearity()]
    return nn.Sequential(*modules, nn.Linear(sizes[-1], 3, bias=bias)).eval()


def cnn(seed=0, widths=(8, 10)):
    """Layers "0", "3" and "7", batch norms after and before a ReLU, modules that overwrite their input."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(2, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)),
        *(nn.Conv2d(*widths, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(widths[1])),
        *(nn.Flatten(), nn.Linear(16 * widths[1], 3)),
    ).eval()


def scatnet(arch="Fw Std Pr N", psi="mod", seed=0, widths=(6, 8, 10), norm="std", **fields):
    """A learned scattering network."""
    torch.manual_seed(seed)
    archs = {"arch": tuple(arch.split()), "psi_arch": tuple(psi.split())}
    blocks = (BlockConfig(**archs, kind=i % 2, Pr_size=n, Pc_size=n, **fields) for i, n in enumerate(widths))
    return ScatNet(ScatNetConfig(Signal(2, 8, 8), 3, tuple(blocks), norm, False)).eval()


def skip(arch="Fw rho Std Pr N", **options):
    """Scattering with a skip connection."""
    return scatnet(arch, "", **options)


def resnet(seed=0, batch_norm="pre"):
    """A narrow ResNet-18 for images of 32×32."""
    torch.manual_seed(seed)
    config = StandardConfig("resnet18-custom", 3, Signal(2, 32, 32), width=0.125, batch_norm=batch_norm)
    return build(config).eval()


def double(x):
    """x in double precision, real or complex."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def run(network, data):
    """The network's scores on all images."""
    with torch.no_grad():
        return torch.cat([network(images) for images, _ in data])


def accuracy(network, data):
    """Percent of the images."""
    labels = torch.cat([labels for _, labels in data])
    return 100 * (run(network.eval(), data).argmax(1) == labels).float().mean().item()


def random_isometry(size, dtype=torch.float64, seed=0):
    """A random orthogonal or unitary matrix."""
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))).Q
