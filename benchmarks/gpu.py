"""Throughput, memory and share of peak of every network of the paper, on the accelerator that is available.

    python benchmarks/gpu.py [--only NAME ...] [--variants float32 tf32 amp compile amp+compile] [--batch-size N]
    python benchmarks/gpu.py --device cpu --batch-size 2      # without one: does it run?

A training step is forward, backward and SGD update, as `main_block.py` does it, on images that lie on the device.
Peak: the operations per second of one large matrix product in the same precision on the same device. A step's own are
torch's count (`FlopCounterMode`) of the products and convolutions forward, three times: backward takes two for each.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from train_step import NETWORKS as SCATTERING  # noqa: E402
from train_step import step  # noqa: E402

from models import build  # noqa: E402
from models.block import exclude_from_compilation  # noqa: E402
from models.config import StandardConfig  # noqa: E402
from models.signal import Signal  # noqa: E402
from utils.device import describe_device, pick_device  # noqa: E402
from utils.errors import UserError, run_main  # noqa: E402

NETWORKS = {
    **SCATTERING,
    "imagenet": (SCATTERING["imagenet"][0], 128),
    "resnet18": (StandardConfig("resnet18", input=Signal(3, 224, 224), num_classes=1000), 256),
    "resnet18-cifar": (StandardConfig("resnet18-custom", input=Signal(3, 32, 32), num_classes=10), 128),
    "vgg11": (StandardConfig("vgg11", input=Signal(3, 224, 224), num_classes=1000), 64),
}
VARIANTS = ("float32", "tf32", "amp", "compile", "amp+compile")


def seconds(function, device, repetitions):
    """Mean seconds of a call, after three others."""
    wait = getattr(torch, device.type).synchronize
    for times in (3, repetitions):
        wait()
        start = time.perf_counter()
        for _ in range(times):
            function()
        wait()
    return (time.perf_counter() - start) / repetitions


def peak(device, variant):
    """Floating point operations per second of one large matrix product, as this variant computes it."""
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if "amp" in variant else torch.float)
    return 2 * side**3 / seconds(lambda: matrix @ matrix, device, 10)


def training_step(config, batch, device, variant):
    """A function that runs one training step."""
    torch.manual_seed(0)
    network = build(config).to(device, memory_format=torch.channels_last)
    if "compile" in variant:
        exclude_from_compilation(network)
        network = torch.compile(network)
    return step(network, config, batch, device=device, amp="amp" in variant)


def operations(config):
    """Floating point operations of a training step for one image: forward, and twice that backward."""
    signal = config.input
    images = torch.randn(2, signal.channels, signal.height, signal.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(config).requires_grad_(False)(images)  # the counter of older versions asks learned weights for gradients
    return 3 * counter.get_total_flops() / len(images)


def memory(device):
    """Most memory in use since the last call, in GB; None if the device does not say."""
    if device.type != "cuda":
        return None
    used = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return used


def report(name, args, device, variant, fastest):
    """Prints a line: images per second, memory, share of peak."""
    config, batch = NETWORKS[name]
    batch = args.batch_size or batch
    try:
        work = batch * operations(config)
        memory(device)
        spent = seconds(training_step(config, batch, device, variant), device, args.steps)
    except torch.cuda.OutOfMemoryError:
        print(f"{name:15} {variant:12} {batch:6}  not enough memory: use a smaller --batch-size")
        return
    used = memory(device)
    text = f"{name:15} {variant:12} {batch:6} {batch / spent:12.1f} {'' if used is None else f'{used:.2f}':>10}"
    print(text, f"{100 * work / spent / fastest:9.1f} %", flush=True)


def main(argv=None):
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--only", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="networks to time (default: all)")
    top.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all that the device has")
    top.add_argument("--batch-size", type=int, metavar="N", help="images in a step (default: that of the paper)")
    top.add_argument("--steps", type=int, default=20, help="timed steps (default 20), after three others")
    top.add_argument("--device", default="auto", help="cuda, cuda:N, mps or cpu (default: the accelerator)")
    args = top.parse_args(argv)
    device = pick_device(args.device)
    if device.type == "cpu" and args.device == "auto":
        print("No accelerator is available: nothing is measured (--device cpu --batch-size 2 shows that it runs).")
        return 0
    possible = [variant for variant in VARIANTS if device.type == "cuda" or "tf32" not in variant]
    for variant in args.variants or ():
        if variant not in possible:
            raise UserError(f"--variants {variant}: not available on {device}; choose among {', '.join(possible)}")
    print(f"{describe_device(device)}, torch {torch.__version__}")
    print(f"{'network':15} {'variant':12} {'batch':>6} {'images/s':>12} {'memory GB':>10} {'of peak':>11}")
    for variant in args.variants or possible:
        torch.set_float32_matmul_precision("high" if variant == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = variant == "tf32"
        fastest = peak(device, variant)
        for name in args.only:
            report(name, args, device, variant, fastest)
        print(f"{'one product':15} {variant:12} {'':6} {'':12} {'':10} {fastest / 1e12:9.2f} TFLOP/s")
    return 0


if __name__ == "__main__":
    run_main(main)
