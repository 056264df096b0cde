"""Small trainings for the tests: commands that take a fraction of a second, run in this process, and compared."""

import torch

import main_block
from utils.runs.checkpoints import load

COMMON = (
    "--digits --data-subset 0:20 --epochs 3 --learning-rate-adjust-frequency 2 --lr 0.05 --batch-size 64 "
    "--device cpu --n-blocks 2 --factorize-filters 0 --scat-angles 4 4 --classifier-batch-norm std "
    "--no-classifier-bias"
).split()
NETWORKS = {
    "norm": ["-a", "Fw Std Pr N", "--psi-arch", "mod", "--Pr-size", "4", "8"],
    "frozen": ["-a", "Fw Std Pr N", "--psi-arch", "mod", "--Pr-size", "4", "8", "--freeze-P", "1", "1"],
    "complex": ["-a", "Fw rho Std Pc", "--Pc-size", "4"],
    "parseval": ["-a", "Fw Std Pr", "--psi-arch", "mod", "--Pr-size", "4", "--pars-reg"],
    "vgg": ["--arch", "vgg11-custom", "--standard-width-scaling", "0.03", "--resize-images", "32"],
}
STEPS = 4  # in an epoch of 200 images


def command(network, name, *more):
    common = COMMON[: COMMON.index("--n-blocks")] if network == "vgg" else COMMON
    return [*common, *NETWORKS[network], "--dir", name, *more]


def train(network, name, *more):
    """Runs the command in checkpoints/NAME of the working directory and returns the last checkpoint."""
    assert main_block.main(command(network, name, *more)) == 0
    return load(f"checkpoints/{name}/last.pt")


def is_same(a, b):
    """Whether two checkpoints are the same, bit for bit, but for times and names."""
    if isinstance(a, dict):
        keys = a.keys() - {"images_per_second", "args"}
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b
