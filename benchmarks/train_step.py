"""Times a training step next to the plain reference and to the matrix products that cannot be avoided.

    python benchmarks/train_step.py [--only NAME ...] [--repetitions 5]

For each network: medians of interleaved repetitions, in one process, of

- ours: forward, backward and SGD update of the network as `main_block.py` trains it;
- reference: the same network run module by module, with wavelets by FFT (`block.fast = False`);
- floor: one `torch.mm` of each projection's shape forward and two backward.

Then the peak resident memory of each in a fresh process. Ratios are what counts: absolute times belong to the machine.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import build  # noqa: E402
from models.config import BlockConfig, ScatNetConfig  # noqa: E402
from models.signal import Signal  # noqa: E402

NORM, SKIP, COMPLEX = ("Fw", "Std", "Pr", "N"), ("Fw", "rho", "Std", "Pr", "N"), ("Fw", "rho", "Std", "Pc")
CIFAR_WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)
IMAGENET_WIDTHS = (32, 64, 64, 128, 256, 512, 512, 512, 512, 512, 256)


def network(arch, widths, signal, classes, first_factorized=0):
    """The configuration of a network of the paper; blocks from `first_factorized` on are factorised."""
    psi, size = () if "rho" in arch else ("mod",), "Pc_size" if "Pc" in arch else "Pr_size"
    kinds = ["plain" if i < first_factorized else (i - first_factorized) % 2 for i in range(len(widths))]
    blocks = (BlockConfig(arch, psi_arch=psi, kind=k, **{size: w}) for k, w in zip(kinds, widths, strict=True))
    return ScatNetConfig(signal, classes, tuple(blocks), classifier_batch_norm="std", classifier_bias=False)


NETWORKS = {
    "norm8": (network(NORM, CIFAR_WIDTHS, Signal(3, 32, 32), 10), 128),
    "skip8": (network(SKIP, CIFAR_WIDTHS, Signal(3, 32, 32), 10), 128),
    "norm4": (network(("Fw", "Std", "Pr"), CIFAR_WIDTHS[:4], Signal(3, 32, 32), 10, 4), 128),
    "laptop": (network(NORM, (16, 32, 64, 64), Signal(1, 8, 8), 10), 32),
    "imagenet": (network(COMPLEX, IMAGENET_WIDTHS, Signal(3, 224, 224), 1000, 1), 8),
}


def products(net, batch):
    """(C, D, n) of every real matrix product of the projections: one product of each shape is the forward floor."""
    shapes = []
    for block in net.blocks:
        (rows, columns), positions = block.P.weight.shape, batch * block.out.height * block.out.width
        half = columns // 2  # of [z, |z|]
        if "rho" not in dict(block.body.named_children()):
            shapes.append((rows, columns, positions))
        elif block.P.weight.is_complex():
            shapes += [(2 * rows, 2 * half, positions), (2 * rows, half, positions)]
        else:
            shapes += [(rows, half, 2 * positions), (rows, half, positions)]
    return shapes


def floor(shapes, training):
    """A function that computes the products of `shapes` on random matrices: forward, and backward if `training`."""
    matrices = [(torch.randn(c, d), torch.randn(d, n), torch.randn(c, n)) for c, d, n in shapes]

    def run():
        for weight, features, gradient in matrices:
            torch.mm(weight, features)
            if training:
                torch.mm(gradient, features.t())
                torch.mm(weight.t(), gradient)

    return run


def step(net, config, batch, training=True, device="cpu", amp=False):
    """A function that runs one training step of a network, or one evaluation, on random images."""
    signal = config.input
    images = torch.randn(batch, signal.channels, signal.height, signal.width, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(config.num_classes, (batch,), device=device)
    net.train(training)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=True)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            scores = net(images)
        F.cross_entropy(scores.float(), labels).backward()
        optimizer.step()

    return train if training else torch.no_grad()(lambda: net(images))


def prepare(name, which, training):
    """The function to time: `which` is "ours", "reference" or "floor"."""
    config, batch = NETWORKS[name]
    torch.manual_seed(0)
    net = build(config)
    if which == "floor":
        return floor(products(net, batch), training)
    for block in net.blocks:
        block.fast = which == "ours"
    return step(net, config, batch, training)


def times(functions, repetitions, inner=1):
    """Median seconds of each function, repetitions interleaved, after one warm-up."""
    for function in functions.values():
        function()
    seconds = {which: [] for which in functions}
    for _ in range(repetitions):
        for which, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            seconds[which].append((time.perf_counter() - start) / inner)
    return {which: statistics.median(values) for which, values in seconds.items()}


def peak_memory(name, which):
    """Peak resident memory, in GB, of two training steps in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(name, repetitions):
    for training in (True, False):
        functions = {which: prepare(name, which, training) for which in ("ours", "reference", "floor")}
        median = times(functions, repetitions, inner=20 if name == "laptop" else 1)
        text = "  ".join(f"{which} {seconds * 1e3:9.1f} ms" for which, seconds in median.items())
        ratios = median["ours"] / median["floor"], median["reference"] / median["ours"]
        text += "  ours/floor {:5.2f}  reference/ours {:5.2f}".format(*ratios)
        print(f"{name:9} {'step' if training else 'eval'}  {text}", flush=True)
    peaks = (f"{which} {peak_memory(name, which):.2f} GB" for which in ("ours", "reference"))
    print(f"{name:9} peak  " + "  ".join(peaks), flush=True)


def main():
    top = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    top.add_argument("--only", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="networks to time (default: all)")
    top.add_argument("--repetitions", type=int, default=5, help="timed repetitions of each (default 5)")
    top.add_argument("--peak", nargs=2, metavar=("NAME", "WHICH"), help=argparse.SUPPRESS)
    arguments = top.parse_args()
    if arguments.peak:
        run = prepare(*arguments.peak, training=True)
        run(), run()
        return print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.only:
        report(name, arguments.repetitions)
    return None


if __name__ == "__main__":
    main()
