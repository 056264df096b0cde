"""What the analysis costs beside the networks' own forward passes, on random images.

    python benchmarks/analysis.py [--images 1500] [--width 0.125] [--batch-size 128] [--threads 2] [--repeats 3]
    python benchmarks/analysis.py --memory [--channels 410] [--device cpu]

Two ratios are printed for each kind of network, medians over repeats that are measured in turn:

- resampling: the time to sample an eight-block rainbow network, evaluations aside, over that of a forward pass of the
  network over the same images; with all activations kept, and with none (partial passes from the images). Allowed: 6,
  where activations are kept.
- moments: the time for the second moments of all layers of five networks, over the time of their forward passes plus
  that of the matrix products alone; for the ResNet also of the patches that its convolutions meet. Allowed: 1.5.

With --memory, what sampling, moments and covariances take at their peak, besides what was there, as a multiple of
a layer's covariance: D² numbers of double precision, for a network of three layers of D = 10 times --channels. Allowed
for sampling: 8. Moments hold the results of all their pairs and layers.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from multiprocessing import get_context
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
from rainbow.covariance import WeightCovariance  # noqa: E402
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


def memory_task(task, channels, device):
    """What is to be measured of a skip network of four blocks, as a call, and the D of its widest layers."""
    blocks = tuple(BlockConfig(("Fw", "rho", "Std", "Pr", "N"), kind=k % 2, Pr_size=channels) for k in range(4))
    networks = [ScatNet(ScatNetConfig(Signal(3, 8, 8), 10, blocks, "std", False)).eval().to(device) for _ in range(2)]
    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)) for _ in range(channels * 12 // 64 + 1)]
    reference = MeanNetwork.fit(networks[:1], data)
    layer = reference.layers[0][-2]
    tasks = {
        "sampling": lambda: RainbowSampler(reference, data, memory=0).sample(),
        "moments of a pair": lambda: moments(networks, None, data, auto=False, cross=0),
        "covariance": lambda: WeightCovariance.fit(layer.get()),
    }
    return tasks[task], layer.channels


def peak_memory(task, channels, device):
    """Prints the peak of a task in multiples of D²; runs in a process of its own."""
    rainbow_layers.register()
    run, dimension = memory_task(task, channels, device)
    with on_device(device) as peak:
        run()
    numbers = 8 * dimension**2
    print(f"{task:18} {peak() / numbers:5.1f} D²  (D = {dimension}, D² = {numbers / 1e6:.0f} MB)", flush=True)


@contextmanager
def on_device(device):
    """Yields a function that tells the bytes taken at the peak inside the block."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is the present again
    before = high_water()
    yield lambda: high_water() - before


def high_water():
    """The peak of this process's memory in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--channels", type=int, default=410)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.memory:
        for task in ("sampling", "moments of a pair", "covariance"):
            child = get_context("spawn").Process(target=peak_memory, args=(task, args.channels, args.device))
            child.start()
            child.join()
        return
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
