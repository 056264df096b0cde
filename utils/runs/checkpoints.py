"""Checkpoints: dicts of tensors and plain values, written whole and read without running any code of the file."""

import io
import pickle
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError, first_line
from utils.files import atomic_write
from utils.runs.options import arch_name
from utils.runs.original import convert_original, is_original


def save(path, checkpoint, previous=None):
    """Writes a dict of tensors and plain values that `load` reads, atomically; see `atomic_write`."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()), previous)


def load(path):
    """The checkpoint in a file, on the CPU: a dict with a `state_dict`.

    Every part is compared with its checksum first. Raises UserError if the file is missing, damaged, not a
    checkpoint, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb") as file:
            _verify_checksums(file)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: not only tensors and plain values") from error
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise UserError(f"{path}: damaged or not a checkpoint ({first_line(error)})") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: not a checkpoint of this program or the authors' (it has no state_dict)")
    return checkpoint


def _verify_checksums(file):
    """torch's files are zip archives with a CRC-32 for each part, which torch itself does not verify."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of its part {damaged}")
    file.seek(0)


def is_saved_epoch(epoch):
    """Whether the checkpoint after `epoch` epochs is kept: 0, 1, 2, 5, 10, 20, 50, 100, …"""
    while epoch >= 10 and epoch % 10 == 0:
        epoch //= 10
    return epoch in (0, 1, 2, 5)


def stored_args(args, data):
    """The resolved arguments as they are stored, with `signal` and `num_classes` of the data."""
    signal = data.signal
    shape = [signal.channels, signal.height, signal.width]
    return {**vars(args), "input_shape": shape, "num_classes": data.num_classes}


def checkpoint_of(network, args, data, epoch, best_acc1):
    """The dict that `load` reads: weights, epochs done, architecture, best top-1 accuracy (%), `stored_args`."""
    return {
        "state_dict": network.state_dict(),
        "epoch": epoch,
        "arch": arch_name(args),
        "best_acc1": best_acc1,
        "args": stored_args(args, data),
    }


def load_weights(network, state_dict, source):
    """Sets the weights of a network from a state dict of this program or of the authors'.

    Raises UserError, naming `source` and what does not fit; the network is then unchanged.
    """
    if is_original(state_dict):
        state_dict = convert_original(state_dict, network, source)
    own = network.state_dict()
    problems = [f"missing key {name!r}" for name in sorted(own.keys() - state_dict.keys())]
    problems += [f"unexpected key {name!r}" for name in sorted(state_dict.keys() - own.keys())]
    for name in own.keys() & state_dict.keys():
        tensor, expected = state_dict[name], own[name]
        if not torch.is_tensor(tensor) or tensor.shape != expected.shape:
            problems.append(f"{name} is {_shape(tensor)}, expected {_shape(expected)}")
        elif tensor.is_complex() != expected.is_complex():
            problems.append(f"{name} is real in one and complex in the other")
    if problems:
        raise UserError(f"{source}: weights of another network ({problems[0]})")
    network.load_state_dict(state_dict)


def _shape(tensor):
    return "×".join(map(str, tensor.shape)) or "a number" if torch.is_tensor(tensor) else "not a tensor"
