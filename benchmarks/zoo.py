"""Which verb works for which of torchvision's classification networks, with random weights, or why not.

    python benchmarks/zoo.py [--match 'resnet*'] [--size 64] [--images 16] [--largest 30]

One line for each network: how many of its weight matrices are aligned, the largest error of aligning it with itself
(0 where all is right), the seconds of fit and table, and of align; and sample and clip: ok, or the reason. Networks of
more than `largest` million parameters are left out.
"""

import argparse
import fnmatch
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rainbow import Rainbow, RainbowError  # noqa: E402

SIZES = {"inception_v3": 96, "maxvit_t": 224}
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def build(name, size):
    """A network of ten classes with random weights, for images of so many pixels."""
    options = dict(OPTIONS.get(name, {}))
    if name.startswith("vit"):
        options["image_size"] = size
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()


def parameters(name):
    """Millions, as published."""
    return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] / 1e6


def attempt(action):
    """What an action returns and the seconds it takes, or the reason for its refusal."""
    start = time.perf_counter()
    try:
        return action(), time.perf_counter() - start
    except RainbowError as error:
        return str(error), time.perf_counter() - start


def try_network(name, images, size):
    """The cells of a line."""
    size = SIZES.get(name, size)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(images // 2, 3, size, size, generator=generator), torch.arange(images // 2) % 10)] * 2
    model = build(name, size)
    fitted, seconds = attempt(lambda: Rainbow.fit(model, data))
    if isinstance(fitted, str):
        return [name, fitted]
    _, of_table = attempt(fitted.table)
    errors, of_align = attempt(lambda: max(fitted.align(model).values()))
    aligned = f"{len(fitted.layers)} of {len(fitted.layers) + len(fitted.skipped)}"
    last = list(fitted.layers)[-1]
    sampled, clipped = (attempt(act)[0] for act in (fitted.sample, lambda: fitted.clip(last, ranks=[0, 1])))
    verdicts = [text if isinstance(text, str) else "ok" for text in (sampled, clipped)]
    return [name, aligned, f"{errors:.1g}", f"{seconds + of_table:.1f} s", f"{of_align:.1f} s", *verdicts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="*", help="pattern of names")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--largest", type=float, default=30, help="millions of parameters")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("network | aligned | error with itself | fit and table | align | sample | clip")
    for name in fnmatch.filter(torchvision.models.list_models(module=torchvision.models), args.match):
        if parameters(name) <= args.largest:
            print(" | ".join(try_network(name, args.images, args.size)), flush=True)


if __name__ == "__main__":
    main()
