"""Checkpoints: dicts of tensors and plain values, written whole and read without running any code of the file."""

import io
import pickle
import re
import zipfile
from pathlib import Path

import torch

from utils.errors import UserError, first_line
from utils.files import atomic_write
from utils.runs.options import arch_name
from utils.runs.original import convert_original, is_original, plain_names


def save(path, checkpoint, previous=None):
    """Writes a dict of tensors and plain values that `load` reads, atomically; see `atomic_write`."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()), previous)


def load(path):
    """The checkpoint in a file, on the CPU: a dict with a `state_dict`, which also may be all that the file holds.

    Every part is compared with its checksum first. Raises UserError if the file is missing, damaged, not a
    checkpoint, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch's files have a CRC-32 for each part, which torch itself does not verify
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of its part {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: not only tensors and plain values") from error
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise UserError(f"{path}: damaged or not a checkpoint ({first_line(error)})") from error
    if isinstance(checkpoint, dict) and checkpoint and all(map(torch.is_tensor, checkpoint.values())):
        checkpoint = {"state_dict": checkpoint}
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: not a checkpoint of this program or the authors' (it has no state_dict)")
    return {**checkpoint, "state_dict": plain_names(state)}


def is_saved_epoch(epoch):
    """Whether the checkpoint after `epoch` epochs is kept: 0, 1, 2, 5, 10, 20, 50, 100, …"""
    return bool(re.fullmatch("0|[125]0*", str(epoch)))


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


def load_weights(network, state_dict, source, loose=False):
    """Sets the weights of a network from a state dict of this program or of the authors'; returns what does not fit.

    loose: weights that do not fit stay as they are. Else raises UserError, naming `source` and what does not fit; the
    network is then unchanged.
    """
    state_dict = plain_names(state_dict)
    if is_original(state_dict):
        state_dict = convert_original(state_dict, network, source, loose)
    own = network.state_dict()
    problems = list(_misfits(state_dict, own))
    fitting = {name for name in own.keys() & state_dict.keys() if _shape(state_dict[name]) == _shape(own[name])}
    if problems and not (loose and fitting):
        raise UserError(f"{source}: weights of another network ({problems[0]})")
    network.load_state_dict({**own, **{name: state_dict[name] for name in fitting}})
    return problems


def _misfits(found, expected):
    """What does not fit between two state dicts, in words."""
    yield from (f"missing key {name!r}" for name in sorted(expected.keys() - found.keys()))
    yield from (f"unexpected key {name!r}" for name in sorted(found.keys() - expected.keys()))
    for name in [name for name in expected if name in found]:
        shape, right = _shape(found[name]), _shape(expected[name])
        if shape != right:
            yield f"{name} is {shape}, expected {right}"


def _shape(tensor):
    """The size and kind of numbers of a tensor in words, such as 3×4 or 3×4 complex."""
    if not torch.is_tensor(tensor):
        return "not a tensor"
    return ("×".join(map(str, tensor.shape)) or "a number") + " complex" * tensor.is_complex()
