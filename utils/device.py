"""Where tensors live: every program picks its device here, by name."""

import torch

from utils.errors import UserError


def pick_device(name="auto"):
    """The torch device called `name`; "auto" is the first of cuda, mps and cpu that is there.

    Raises UserError where the device is unknown or absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not supported; auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(f"--device {name}: this machine has no usable CUDA GPU; --device cpu or auto")
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine has {count} GPU(s), numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: this machine has no usable MPS device; --device cpu or auto")
    return device


def describe_device(device):
    """One line for the log: the device's name, and the number of threads of a CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
