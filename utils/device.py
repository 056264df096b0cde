"""Where tensors live: every program picks its device here, by name."""

import torch

from utils.errors import UserError


def pick_device(name="auto"):
    """The torch device called `name`; "auto" is the first of cuda, mps and cpu that is there.

    Raises UserError where the device is unknown or absent.
    """
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    try:
        device = torch.device(name)
        count = counts[device.type]
    except (RuntimeError, KeyError):
        raise UserError(f"--device {name}: no such device; auto, cpu, cuda, cuda:N or mps") from None
    if not count:
        raise UserError(
            f"--device {name}: this machine has no usable {device.type.upper()} device; --device cpu or auto"
        )
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} GPU(s), numbered from 0")
    return device


def describe_device(device):
    """One line for the log: the device's name, and the number of threads of a CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
