"""Times a training step beside the plain reference and beside the matrix products that cannot be avoided.

    python benchmarks/train_step.py [--only NAME ...] [--repetitions 5] [--no-reference] [--no-memory]

For each network: medians of interleaved repetitions, in one process, of

- ours: forward, backward and SGD update of the network as `main_block.py` trains it;
- reference: the same network run module by module, with wavelets by FFT (`block.fast = False`);
- floor: one `torch.mm` of each projection's shape forward and two backward.

Then the peak resident memory of each in a fresh process. Ratios are what counts: absolute times belong to the machine.
"""

import argparse
import functools
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
from utils.data.datasets import load_datasets  # noqa: E402
from utils.runs.options import parse  # noqa: E402

NORM, SKIP, COMPLEX = ("Fw", "Std", "Pr", "N"), ("Fw", "rho", "Std", "Pr", "N"), ("Fw", "rho", "Std", "Pc")
CIFAR_WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)
IMAGENET_WIDTHS = (32, 64, 64, 128, 256, 512, 512, 512, 512, 512, 256)


def network(arch, widths, signal, classes, first_factorized=0):
    """The configuration of a network of the paper; blocks from `first_factorized` on are factorised."""
    psi = () if "rho" in arch else ("mod",)
    size = "Pc_size" if "Pc" in arch else "Pr_size"
    blocks = tuple(
        BlockConfig(
            arch, psi_arch=psi, kind="plain" if i < first_factorized else (i - first_factorized) % 2, **{size: width}
        )
        for i, width in enumerate(widths)
    )
    return ScatNetConfig(signal, classes, blocks, classifier_batch_norm="std", classifier_bias=False)


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
        rows, columns = block.P.weight.shape
        positions = batch * block.out.height * block.out.width
        if "rho" not in dict(block.body.named_children()):
            shapes.append((rows, columns, positions))
            continue
        half = columns // 2  # z and |z|
        if block.P.weight.is_complex():
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


def step(net, batch, classes, training):
    """A function that runs one training step of a network, or one evaluation."""
    signal = net.blocks[0].signal
    images = torch.randn(batch, signal.channels, signal.height, signal.width).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,))
    net.train(training)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=True)

    def train():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    def evaluate():
        with torch.no_grad():
            net(images)

    return train if training else evaluate


def prepare(name, which, training):
    """The function to time: `which` is "ours", "reference" or "floor"."""
    config, batch = NETWORKS[name]
    torch.manual_seed(0)
    net = build(config)
    if which == "floor":
        return floor(products(net, batch), training)
    for block in net.blocks:
        block.fast = which == "ours"
    return step(net, batch, config.num_classes, training)


def block_steps(name):
    """For each block of a network: functions that run it forward and backward, ours and the reference."""
    config, batch = NETWORKS[name]
    torch.manual_seed(0)
    for block in build(config).blocks:
        signal = block.signal
        images = torch.randn(
            batch,
            signal.channels,
            signal.height,
            signal.width,
            dtype=torch.cfloat if signal.complex else torch.float,
            requires_grad=True,
        )
        gradient = torch.randn_like(block(images))

        def run(fast, block=block, images=images, gradient=gradient):
            block.fast = fast
            torch.autograd.grad(block(images), (images, block.P.weight), gradient)

        yield signal, {"ours": functools.partial(run, True), "reference": functools.partial(run, False)}


def loader_seconds(batch):
    """Seconds a batch of the digits takes to be served, mean of 20 epochs."""
    loader_of = load_datasets(parse(["-a", "Fw Pr", "--psi-arch", "mod", "--Pr-size", "1", "--digits"])).train.loader
    start, batches = time.perf_counter(), 0
    for epoch in range(20):
        batches += sum(1 for _ in loader_of(batch, shuffle=True, seed=0, epoch=epoch, augment=True))
    return (time.perf_counter() - start) / batches


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


def high_water_mark():
    """Peak resident memory of this process so far, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def peak_memory(name, which):
    """Peak resident memory, in GB, of two training steps in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(name, arguments):
    for training in (True, False):
        kinds = ["ours", "floor"] if arguments.no_reference else ["ours", "reference", "floor"]
        functions = {which: prepare(name, which, training) for which in kinds}
        median = times(functions, arguments.repetitions, inner=20 if name == "laptop" else 1)
        text = "  ".join(f"{which} {seconds * 1e3:9.1f} ms" for which, seconds in median.items())
        text += f"  ours/floor {median['ours'] / median['floor']:5.2f}"
        if "reference" in median:
            text += f"  reference/ours {median['reference'] / median['ours']:5.2f}"
        print(f"{name:9} {'step' if training else 'eval'}  {text}", flush=True)
        if name == "laptop" and training:
            seconds = loader_seconds(NETWORKS[name][1])
            print(f"  its loader takes {seconds / median['ours']:.1%} of the step")
    if name == "imagenet" and not arguments.no_reference:
        for number, (signal, functions) in enumerate(block_steps(name), start=1):
            median = times(functions, arguments.repetitions)
            print(
                f"  block {number:2} on {str(signal):38} ours {median['ours'] * 1e3:7.1f} ms  "
                f"reference/ours {median['reference'] / median['ours']:5.2f}",
                flush=True,
            )
    if not arguments.no_memory:
        peaks = {which: peak_memory(name, which) for which in kinds if which != "floor"}
        print(f"{name:9} peak  " + "  ".join(f"{which} {gb:.2f} GB" for which, gb in peaks.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NAME",
        help=f"networks to time ({', '.join(NETWORKS)})",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="timed repetitions of each (default 5)")
    parser.add_argument("--no-reference", action="store_true", help="leave out the slow reference")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of fresh processes")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "WHICH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        run = prepare(*arguments.peak, training=True)
        run()
        run()
        print(high_water_mark())
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.only:
        report(name, arguments)


if __name__ == "__main__":
    main()
