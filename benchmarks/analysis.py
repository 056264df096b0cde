"""What the analysis costs beside the networks' own forward passes, on random images.

    python benchmarks/analysis.py [--images 1500] [--width 0.125] [--batch-size 128] [--threads 2] [--repeats 3]

Two ratios are printed for each kind of network, medians over repeats that are measured in turn:

- resampling: the time to sample an eight-block rainbow network, evaluations aside, over that of a forward pass of the
  network over the same images; with all activations kept, and with none (partial passes from the images). Allowed: 6,
  where activations are kept.
- moments: the time for the second moments of all layers of five networks, over the time of their forward passes plus
  that of the matrix products alone; for the ResNet also of the patches that its convolutions meet. Allowed: 1.5.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build, rainbow_layers  # noqa: E402
from models.config import BlockConfig, ScatNetConfig, StandardConfig  # noqa: E402
from models.scatnet import ScatNet  # noqa: E402
from models.signal import Signal  # noqa: E402
from rainbow import weight_layers  # noqa: E402
from rainbow.alignment import MeanNetwork  # noqa: E402
from rainbow.moments import moments, stream_samples  # noqa: E402
from rainbow.running import evaluating  # noqa: E402
from rainbow.samples import triangle  # noqa: E402
from rainbow.sampling import RainbowSampler  # noqa: E402

WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)
KINDS = {"modulus": ("Fw Std Pr N", "mod"), "skip": ("Fw rho Std Pr N", ""), "complex skip": ("Fw rho Std Pc N", "")}
NETWORKS = 5


def scattering(kind, width, seed=0):
    """An eight-block network with random weights, for CIFAR's shape."""
    torch.manual_seed(seed)
    arch, psi = KINDS[kind]
    blocks = tuple(
        BlockConfig(
            tuple(arch.split()),
            psi_arch=tuple(psi.split()),
            kind=index % 2,
            Pr_size=int(width * size),
            Pc_size=int(width * size),
        )
        for index, size in enumerate(WIDTHS)
    )
    return ScatNet(ScatNetConfig(Signal(3, 32, 32), 10, blocks, "std", False)).eval()


def resnet(width, seed=0):
    """A ResNet-18 with random weights, of the same width scaling."""
    torch.manual_seed(seed)
    return build(StandardConfig("resnet18-custom", 10, Signal(3, 32, 32), width=width)).eval()


def seconds(action):
    """CPU time of a call, which other programs hardly disturb, and its result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def random_images(count, batch_size):
    """Batches (images, labels) of CIFAR's shape."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(batch_size)]


def forward(networks, data):
    """Runs networks over all images."""
    with evaluating(*networks):
        for images, _ in data:
            for network in networks:
                network(images)


def products(networks, data, patches):
    """Seconds of the symmetric products alone, half of each, of samples that are there already."""
    total = 0.0
    with evaluating(*networks):
        for network in networks:
            layers = weight_layers(network, data[0][0])
            for images, _ in data:
                held = []
                stream_samples(
                    network, layers, images, patches, lambda k, samples, *_, held=held: held.append(samples.clone())
                )
                for piece in (piece for samples in held for piece in samples.pieces()):
                    total += sum(seconds(lambda x=x: multiply(x))[0] for x in real_matrices(piece))
    return total


def real_matrices(samples):
    """The pairs of real matrices whose products make up Σ φ φ^H."""
    parts = [columns for _, columns, _ in samples.parts()]
    return [(parts[0], None)] if len(parts) == 1 else [(parts[0], None), (parts[1], None), (parts[1], parts[0])]


def multiply(matrices):
    """The product of two matrices of samples, or the half of one with itself that is needed."""
    a, b = matrices
    if b is not None:
        return a.T @ b
    return [a[:, rows].T @ a[:, columns] for rows, columns in triangle(a.shape[1])]


def resampling_ratios(network, data, repeats):
    """Time of a sample over that of a forward pass: with all activations kept, and with none."""
    reference = MeanNetwork.fit([network], data)
    kept, none = (RainbowSampler(reference, data, memory=memory) for memory in (1 << 40, 0))
    forward([network], data)
    rows = []
    for repeat in range(repeats):
        once = seconds(lambda: forward([network], data))[0]
        times = [seconds(lambda sampler=sampler, r=repeat: sampler.sample(r))[0] for sampler in (kept, none)]
        rows.append([sample / once for sample in times])
    return [median(column) for column in zip(*rows)]


def moments_ratio(networks, data, repeats, patches=False):
    """Time of all second moments over that of forward passes and products."""
    forward(networks, data)
    ratios = []
    for _ in range(repeats):
        least = seconds(lambda: forward(networks, data))[0] + products(networks, data, patches)
        ratios.append(seconds(lambda: moments(networks, None, data, patches=patches, means=not patches))[0] / least)
    return median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rainbow_layers.register()
    torch.set_num_threads(args.threads)
    data = random_images(args.images, args.batch_size)
    makers = {kind: lambda seed, kind=kind: scattering(kind, args.width, seed) for kind in KINDS}
    makers["ResNet-18"] = lambda seed: resnet(args.width, seed)
    print(f"{args.images} images of 32×32, width {args.width:g}, {args.threads} threads, medians of {args.repeats}")
    for kind, make in makers.items():
        kept, none = resampling_ratios(make(0), data, args.repeats)
        networks = [make(seed) for seed in range(NETWORKS)]
        ratios = f"{moments_ratio(networks, data, args.repeats):4.2f}"
        if kind not in KINDS:
            ratios += f", {moments_ratio(networks, data, args.repeats, patches=True):4.2f} of patches"
        print(
            f"{kind:14} resampling / forward pass: {kept:5.1f} kept, {none:5.1f} from the images;  "
            f"moments / (forward passes + products): {ratios}",
            flush=True,
        )


if __name__ == "__main__":
    main()
