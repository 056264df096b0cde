"""What `main_block.py` and `resample.py` share: precision, the folder of a run held by one process, its description."""

import contextlib
import platform
import re
import time
import traceback
from importlib import metadata

import torch

from utils.errors import RunError, StoppedError, UserError, WriteError, cause_of
from utils.files import write_json
from utils.lock import Lock
from utils.runs.log import RunLog


def set_precision(device, tf32=None):
    """Where CUDA GPUs use TensorFloat-32: in all products (tf32 true), in convolutions alone (false), the default of
    PyTorch and of the authors, or nowhere (None), as the analysis needs it. cuDNN's algorithms are repeatable ones, not
    chosen by the clock. Raises UserError for `tf32` on another device.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32 is not None
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    elif tf32:
        raise UserError(f"--tf32 requires a CUDA GPU; this runs on {device}")


@contextlib.contextmanager
def hold(folder, program):
    """The folder for this process alone, free of half-written files. Raises UserError if another process holds it, or
    if another program than `program` works there."""
    folder.refuse_work_of_others(program)
    folder.create()
    try:
        with Lock(folder.path / "lock"):
            folder.refuse_work_of_others(program)
            folder.clean()
            yield
    finally:
        with contextlib.suppress(OSError):
            folder.path.rmdir()  # of a refusal nothing stays


@contextlib.contextmanager
def failures_noted(folder):
    """Notes in status.json why the work in a folder fails, if it does: the first cause of all processes.

    The traceback of an error that is not explained goes to log.txt, and a RunError says so in one line.
    """
    log, since = RunLog(folder, silent=True), time.time()
    try:
        yield
    except RunError as error:
        is_stop = isinstance(error, StoppedError)
        log.ended("stopped" if is_stop else "failed", str(error) if is_stop else cause_of(error), since)
        raise
    except Exception as error:
        first = log.ended("failed", cause_of(error) + hint_for(error), since)
        with contextlib.suppress(WriteError):
            log.keep(traceback.format_exc())
        raise RunError(f"{first}; the traceback is in {folder.path / 'log.txt'}") from error


def hint_for(error):
    """What may help against the error of a library."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return " (--compile needs a C++ compiler that works: leave it out, or install one)"
    if torch.distributed.is_initialized() and re.search("peer|gloo|NCCL", str(error)):
        return " (another process of this training has died, perhaps for want of memory)"
    return ""


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
