"""Outputs of the authors' program: the small set in tests/golden, and a larger one if it lies beside the checkout."""

import functools
import io
import lzma
import shlex
from pathlib import Path

import torch

from models import build
from models.signal import Signal
from utils.runs.networks import network_config
from utils.runs.options import parse

SMALL = Path(__file__).parent / "golden"
LARGER = Path(__file__).resolve().parents[2] / "shared" / "golden"


@functools.cache
def _small():
    data = io.BytesIO(lzma.decompress((SMALL / "outputs.pt.xz").read_bytes()))
    return torch.load(data, weights_only=True)


@functools.cache
def golden(name):
    """The output called NAME, in the larger set if it is called larger/NAME."""
    group, _, stem = name.rpartition("/")
    return torch.load(LARGER / f"{stem}.pt", weights_only=True) if group else _small()[name]


GOLDEN_NAMES = [name for name in _small() if name != "filters"]
GOLDEN_NAMES += sorted(f"larger/{path.stem}" for path in LARGER.glob("*.pt") if path.stem != "filters")
REPLAYS = ["J8-norm-fact0-L4", *(f"larger/{path.stem}" for path in sorted(LARGER.glob("*-fact0-L4.pt")))]


def golden_args(name):
    """The parsed command line of a golden network, for the CPU."""
    return parse([*golden(name)["argv"], "--device", "cpu"], {})


def golden_network(name):
    """The network that the command line of a golden output builds, with weights of its own."""
    data = golden(name)
    return build(network_config(golden_args(name), Signal(data["input"].shape[1], 32, 32), data["logits"].shape[1]))


@functools.cache
def original_commands():
    """Name -> words of the command line, of the authors' 228 experiments."""
    text = lzma.decompress((SMALL / "commands.tsv.xz").read_bytes()).decode()
    return {name: shlex.split(command) for name, command in (line.split("\t") for line in text.splitlines())}
