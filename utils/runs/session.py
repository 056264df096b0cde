"""What `main_block.py` and `resample.py` share: precision, the folder of a run held by one process, its description."""

import contextlib
import platform
from importlib import metadata

import torch

from utils.errors import StoppedError, UserError
from utils.files import write_json
from utils.lock import Lock


def set_precision(device, tf32=False):
    """TensorFloat-32 products if asked for, wherever they could be used. Raises UserError if the device has none."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    elif tf32:
        raise UserError(f"--tf32 requires a CUDA GPU; this runs on {device}")


@contextlib.contextmanager
def hold(folder):
    """The folder for this process alone, free of half-written files. Raises UserError if another process holds it."""
    folder.create()
    with Lock(folder.path / "lock"):
        folder.clean()
        yield


@contextlib.contextmanager
def failures_noted(log):
    """Notes in status.json why the run fails, if it does."""
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        log.failed(f"{type(error).__name__}: {error}")
        raise


def refuse_changes(folder, what, command_line, before, after):
    """Raises UserError if the folder holds something (`what`) that other arguments define."""
    for field, (old, new) in command_line.changes(before, after).items():
        remedy = "use --overwrite to start over or a different --dir to keep both"
        raise UserError(f"{folder.path} holds {what} with {field} = {old!r}, now {new!r}: {remedy}")


def count_parameters(network):
    """How many numbers the parameters hold, and how many of them are learned; a complex one holds two."""
    sizes = [(p.numel() * (2 if p.is_complex() else 1), p.requires_grad) for p in network.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_learned in sizes if is_learned)


def describe(folder, argv, args, network, **more):
    """Writes args.json: everything needed to repeat and understand a run. `args`: a dict."""
    total, learned = count_parameters(network)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions.update({package: metadata.version(package) for package in ("torchvision", "numpy")})
    parameters = {"total": total, "learned": learned}
    record = {"argv": argv, "args": args, "versions": versions, "seed": args["seed"], "parameters": parameters}
    write_json(folder.path / "args.json", {**record, **more})
