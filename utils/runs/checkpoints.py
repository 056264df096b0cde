"""Run folders: what a run leaves, how it is found again, and what protects it from kills, full disks and strangers.

A run's folder ROOT/NAME holds args.json, metrics.csv, log.txt, status.json, last.pt (with optimiser and generator
states), previous.pt (the one before), best.pt and epoch_{0,1,2,5,10,20,50,…}.pt. Every file is written beside its
place and renamed into it, so that a reader finds the old content or the new, never a part.
"""

import argparse
import dataclasses
import io
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

import models
from models.projection import Projection
from models.signal import Signal
from utils.errors import UserError, as_user_error, first_line
from utils.files import atomic_write, read_json
from utils.runs import options

RECORDS = ("args.json", "metrics.csv", "log.txt", "status.json")


def save(path, checkpoint, previous=None):
    """Writes a dict of tensors and plain values that `load` reads, atomically; see `atomic_write`."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()), previous)


def load(path):
    """The checkpoint in a file, on the CPU: a dict with a `state_dict`, read without running any code of the file.

    Every part is compared with its checksum first. Raises UserError where the file is missing, damaged, not a
    checkpoint, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        _verify_checksums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, it is not a checkpoint of tensors and plain values only") from error
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise UserError(f"{path}: damaged or not a checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint of this program or the original (it has no state_dict)")
    return checkpoint


def _verify_checksums(path):
    """torch's files are zip archives with a CRC-32 for each part, which torch itself does not compare."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of its part {damaged}")


def is_saved_epoch(epoch):
    """Whether the checkpoint after `epoch` epochs is kept: 0, 1, 2, 5, 10, 20, 50, 100, …"""
    while epoch >= 10 and epoch % 10 == 0:
        epoch //= 10
    return epoch in (0, 1, 2, 5)


def checkpoint_of(network, args, epoch, best_acc1):
    """The dict that `load` reads: weights, epochs done, architecture, best top-1 accuracy (%), resolved arguments."""
    return {
        "state_dict": network.state_dict(),
        "epoch": epoch,
        "arch": options.arch_name(args),
        "best_acc1": best_acc1,
        "args": dict(vars(args)),
    }


class RunFolder:
    """The folder ROOT/NAME of a run. Raises UserError for a name that leads out of ROOT."""

    def __init__(self, root, name):
        parts = re.split(r"[/\\]", str(name))
        if not name or ".." in parts or Path(name).is_absolute() or not str(name).isprintable() or ":" in parts[0]:
            raise UserError(f"--dir {name}: not a name of a run, which must stay inside {root}")
        self.name = str(name)
        self.path = Path(root) / name

    def create(self):
        """Makes the folder. Raises UserError where that is not allowed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def is_started(self):
        """Whether a run has left a checkpoint to go on from."""
        return self.file("last").exists() or self.file("previous").exists()

    def file(self, epoch=None):
        """Where the checkpoint is: of the `epoch` (an integer), "best", "previous" or "last" (the default)."""
        name = f"epoch_{epoch}" if isinstance(epoch, int) else epoch or "last"
        return self.path / f"{name}.pt"

    def epochs(self):
        """The epochs whose checkpoints are there, increasing."""
        found = (re.fullmatch(r"epoch_(\d+)\.pt", file.name) for file in self.path.glob("epoch_*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def description(self):
        """args.json as a dict: argv, args, versions, seed, parameters. Raises UserError."""
        return read_json(self.path / "args.json")

    def args(self):
        """The resolved arguments of the run, as `utils.runs.options.parse` gives them. Raises UserError."""
        return restored_args(self.description().get("args"), self.path / "args.json")

    def status(self):
        """status.json as a dict, or {} for a run that has not begun. Raises UserError where it cannot be read."""
        path = self.path / "status.json"
        return read_json(path) if path.exists() else {}

    def checkpoint(self, epoch=None):
        """The checkpoint of `epoch` (see `file`). A damaged last one is replaced by the one before, said on stderr.

        Raises UserError where there is none.
        """
        path = self.file(epoch)
        if epoch not in (None, "last"):
            if not path.exists():
                have = ", ".join(map(str, self.epochs())) or "none"
                raise UserError(f"{path}: no such checkpoint (epochs kept in {self.path}: {have})")
            return load(path)
        try:
            return load(path)
        except UserError as error:
            if not self.file("previous").exists():
                raise
            print(f"WARNING: {error}; using {self.file('previous')} instead", file=sys.stderr)
            return load(self.file("previous"))

    def save_last(self, checkpoint):
        """Writes last.pt and keeps the one before as previous.pt. Raises WriteError, with both as they were."""
        save(self.file("last"), checkpoint, self.file("previous"))

    def clean(self):
        """Removes what a killed process left half-written. Only for the holder of the folder's lock."""
        for file in self.path.glob(".*.tmp"):
            file.unlink(missing_ok=True)

    def clear(self):
        """Removes what a run has left. Only for the holder of the folder's lock."""
        for file in [*self.path.glob("*.pt"), *(self.path / name for name in RECORDS)]:
            file.unlink(missing_ok=True)

    def recover(self):
        """Puts previous.pt in the place of a missing or damaged last.pt, and says so on stderr. Only for the holder.

        Raises UserError where neither can be read.
        """
        last, previous = self.file("last"), self.file("previous")
        if not last.exists():
            os.replace(previous, last)
            return
        try:
            load(last)
        except UserError as error:
            if not previous.exists():
                raise
            load(previous)
            print(f"WARNING: {error}; going on from {previous}", file=sys.stderr)
            os.replace(previous, last)


def find_checkpoint(name, root):
    """The file of a checkpoint given as a file or a run's folder, as it is or under `root`. Raises UserError."""
    for path in (Path(name), Path(root) / name):
        if path.is_dir() and (path / "last.pt").is_file():
            return path / "last.pt"
        if path.is_file():
            return path
    raise UserError(f"--resume {name}: no such checkpoint, neither there nor in {root}")


def restored_args(values, source):
    """A namespace of resolved arguments from a dict read from `source`. Raises UserError where it is not one."""
    if not isinstance(values, dict) or "arch" not in values:
        raise UserError(f"{source}: holds no arguments of a run")
    defaults = vars(options.parser().parse_args(["-a", "id"]))
    return argparse.Namespace(**{**defaults, **values})


def load_network(folder, epoch=None, device="cpu"):
    """The trained network of a run, in evaluation mode on `device`, and its arguments: (network, args).

    `folder` is a RunFolder, or the path of a checkpoint. Raises UserError for anything missing, damaged or foreign.
    """
    if isinstance(folder, RunFolder):
        checkpoint, source = folder.checkpoint(epoch), folder.file(epoch)
    else:
        checkpoint, source = load(folder), folder
    args = restored_args(checkpoint.get("args"), source)
    network = build_network(args, checkpoint["state_dict"], source)
    load_weights(network, checkpoint["state_dict"], source)
    return network.to(device).eval(), args


def build_network(args, state_dict, source):
    """A network for these arguments and weights, which need neither the data nor the files it started from."""
    args = argparse.Namespace(**{**vars(args), "standard_pretrained": False})
    try:
        n = args.n_blocks
        bases = [_basis(state_dict, index) for index in range(n)]
        args.P_eigenvectors = args.P_eigenvalues = args.P_initialization = [None] * n
        config = options.network_config(args, Signal(*args.input_shape), args.num_classes)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{source}: its arguments describe no network ({first_line(error)})") from error
    if any(basis is not None for basis in bases):
        blocks = [dataclasses.replace(b, projection_basis=basis) for b, basis in zip(config.blocks, bases)]
        config = dataclasses.replace(config, blocks=tuple(blocks))
    with as_user_error(f"{source}: "):
        return models.build(config)


def _basis(state_dict, index):
    names = [name for name in state_dict if re.fullmatch(rf"blocks\.{index}\..*\.basis", name)]
    return state_dict[names[0]] if names else None


def load_weights(network, state_dict, source):
    """Sets the weights of a network from a state dict of this program or of the original.

    Raises UserError, naming `source` and what does not fit; the network is then as it was.
    """
    if is_original(state_dict):
        state_dict = convert_original(state_dict, network, source)
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or extra:
        what = f"it lacks {missing[0]}" if missing else f"it has {extra[0]} besides"
        raise UserError(f"{source}: weights of another network ({what})")
    for name, tensor in state_dict.items():
        if not torch.is_tensor(tensor) or tensor.shape != own[name].shape:
            raise UserError(
                f"{source}: weights of another network ({name} is {_shape(tensor)}, "
                f"the network needs {_shape(own[name])})"
            )
        if tensor.is_complex() != own[name].is_complex():
            raise UserError(f"{source}: weights of another network ({name} is real in one and complex in the other)")
    network.load_state_dict(state_dict)


def _shape(tensor):
    return "×".join(map(str, tensor.shape)) or "a number" if torch.is_tensor(tensor) else "not a tensor"


ORIGINAL_BLOCK = re.compile(r"module\.(\d+)\.(.+)")
ORIGINAL_UNUSED = re.compile(r".*\.(phis|psis)|(.*\.)?non_linearity\d*\.(gain|bias)")


def is_original(state_dict):
    """Whether the names are those of the authors' program."""
    return any(name.startswith("module.") or ORIGINAL_UNUSED.fullmatch(name) for name in state_dict)


def load_original(path, network):
    """The checkpoint of the authors' program in a file, its weights named as in `network`. Raises UserError."""
    checkpoint = load(path)
    return {**checkpoint, "state_dict": convert_original(checkpoint["state_dict"], network, path)}


def convert_original(state_dict, network, source="the checkpoint"):
    """The authors' names and shapes of weights as those of `network`. Raises UserError for what has no counterpart."""
    if all(name.startswith("module.") and not ORIGINAL_BLOCK.fullmatch(name) for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}  # DataParallel's
    own = network.state_dict()
    converted = {name: own[name] for name in _identities(network)}
    for name, value in state_dict.items():
        new_name = name if name in own else _converted_name(name, own)
        if new_name in own:
            converted[new_name] = _converted_value(value, own[new_name])
        elif not ORIGINAL_UNUSED.fullmatch(name):
            raise UserError(f"{source}: the original's {name} has no counterpart in this network")
    return converted


def _identities(network):
    """Names of the weights of projections that are fixed to the identity, which the original does not store."""
    return [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, Projection)
        and not module.weight.requires_grad
        and module.weight.shape[0] == module.weight.shape[1]
        and torch.equal(module.weight, torch.eye(len(module.weight), dtype=module.weight.dtype))
    ]


def _converted_name(name, own):
    """Our name of the original's weight `name`, among the names `own`; None if there is not exactly one."""
    match = ORIGINAL_BLOCK.fullmatch(name)
    if match is None:
        return name.replace("features.module.", "features.")
    block, rest = int(match[1]) - 1, match[2]
    if rest.startswith("bn."):
        return f"classifier.{rest}"
    if rest.startswith("classifier."):
        return f"classifier.linear.{rest.removeprefix('classifier.')}"
    kind = rest.rpartition(".")[2]
    if block < 0:
        return "mix.weight" if kind == "param" else None
    ends = {"param": "(P|Pr|Pc)\\.weight", "mean": "Std\\.mean", "var": "Std\\.var"}
    found = [own_name for own_name in own if re.fullmatch(rf"blocks\.{block}\.(.*\.)?{ends.get(kind, '')}", own_name)]
    return found[0] if len(found) == 1 else None


def _converted_value(value, own):
    """The original's tensor as ours: complex numbers instead of a last dimension of 2, projections as matrices."""
    if own.is_complex() and value.dim() and value.shape[-1] == 2:
        value = torch.view_as_complex(value.contiguous())
    return value.reshape(own.shape) if value.numel() == own.numel() else value
