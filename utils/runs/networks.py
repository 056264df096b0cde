"""Networks from options, for new data or from a checkpoint."""

import pickle
import re
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import models
from models.config import BlockConfig, ScatNetConfig, StandardConfig
from models.signal import Signal
from utils.errors import UserError, as_user_error, first_line
from utils.runs import values
from utils.runs.checkpoints import load, load_weights
from utils.runs.folder import RunFolder
from utils.runs.options import BLOCKS, STANDARD, TRAINING, block_archs, block_kinds, is_standard

_NO_FILE = "none"  # in a list of files: no file for this block
_MATRICES = [option.field for option in TRAINING.options if option.type is values.matrix_file]


def network_config(args, signal, num_classes):
    """The configuration of the network (for `models.build`) for images of type `signal`.

    Raises UserError for values that no network has and for files that cannot be read.
    """
    with as_user_error():
        if is_standard(args):
            biases = {"bias": not args.standard_no_bias, "classifier_bias": not args.standard_classifier_no_bias}
            return StandardConfig(args.arch, num_classes, signal, **biases, **_values(StandardConfig, STANDARD, args))
        blocks = tuple(_block_config(args, index, arch) for index, arch in enumerate(block_archs(args)))
        regularization = "parseval" if args.pars_reg else "quadrature" if args.quadrature_reg else None
        more = _values(ScatNetConfig, BLOCKS, args)
        return ScatNetConfig(signal, num_classes, blocks, regularization=regularization, **more)


def _values(config, network, args, index=None):
    """{field: value} of those fields of a class of configurations that options of a kind of network fill."""
    known = {field.name for field in fields(config)}
    found = {}
    for option in TRAINING.options:
        if option.group.network == network and option.config in known:
            value = getattr(args, option.field)
            value = value[index] if option.per_block else value
            value = _matrix(value) if option.type is values.matrix_file else value
            found[option.config] = tuple(value) if isinstance(value, list) else value
    return found


def _block_config(args, index, arch):
    found = _values(BlockConfig, BLOCKS, args, index)
    if not args.scattering_wph[index]:
        found["psi_arch"] = ("mod", *found["psi_arch"])
    found["kind"] = block_kinds(args.n_blocks, args.factorize_filters)[index]
    chosen = slice(args.P_eigenvectors_start[index], args.P_eigenvectors_end[index])
    if found["projection_basis"] is not None:
        found["projection_basis"] = _rows(found["projection_basis"], chosen, args.P_eigenvectors[index])
    if found["projection_eigenvalues"] is not None:
        found["projection_eigenvalues"] = _positive(found["projection_eigenvalues"][chosen], args.P_eigenvalues[index])
    return BlockConfig(arch=tuple(arch), orthogonal=args.pars_reg or args.quadrature_reg, **found)


def _rows(vectors, chosen, path):
    """The chosen eigenvectors, rows of `vectors` (R, D)."""
    start, end = chosen.start or 0, chosen.stop or len(vectors)
    if vectors.dim() != 2 or not 0 <= start < end <= len(vectors):
        raise UserError(f"{path}: shape {tuple(vectors.shape)} has no rows {start}:{end}")
    return vectors[start:end].contiguous()


def _positive(eigenvalues, path):
    if eigenvalues.is_complex():
        raise UserError(f"{path}: eigenvalues are real numbers, these are complex")
    return eigenvalues.clamp(min=0)


def _matrix(path):
    """The one array in a file, float32 or complex64; no code in the file is run. None for no file."""
    if path is None or path.lower() == _NO_FILE:
        return None
    try:
        if path.endswith(".pt"):
            value = torch.load(path, map_location="cpu", weights_only=True)
        else:
            value = np.load(path, allow_pickle=False)
            if isinstance(value, np.lib.npyio.NpzFile):
                (value,) = value.values()
        value = torch.as_tensor(value)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: not a single numeric matrix") from error
    except Exception as error:  # whatever a stranger's file makes its reader raise
        raise UserError(f"{path}: not a .npy, .npz or .pt file with one matrix ({first_line(error)})") from error
    while value.dim() > 2 and value.shape[-1] == 1:
        value = value.squeeze(-1)  # (C, D, 1, 1), as the authors write kernels
    return value.to(torch.cfloat if value.is_complex() else torch.float)


class Trained(NamedTuple):
    """A network from a checkpoint, its resolved arguments, and the images and classes it was trained on."""

    network: nn.Module
    args: object
    signal: Signal
    num_classes: int


def load_network(folder, epoch=None, device="cpu"):
    """The `Trained` network of a run, in evaluation mode on `device`.

    `folder` is a RunFolder, or the path of a checkpoint. Raises UserError for anything missing, damaged or foreign: no
    older epoch stands in for the last.
    """
    source = folder.file(epoch) if isinstance(folder, RunFolder) else folder
    try:
        checkpoint = load(source) if epoch is None else folder.checkpoint(epoch)
    except UserError as error:
        remedy = "; the command that trained it mends it" if epoch is None and source is not folder else ""
        raise UserError(f"{error}{remedy}") from error
    stored, state_dict = checkpoint.get("args"), checkpoint["state_dict"]
    args = TRAINING.restore(stored, source)
    try:
        signal, num_classes = Signal(*stored["input_shape"]), stored["num_classes"]
        network = models.build(_stored_config(args, signal, num_classes, state_dict))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{source}: its arguments describe no network ({first_line(error)})") from error
    load_weights(network, state_dict, source)
    return Trained(network.to(device).eval(), args, signal, num_classes)


def _stored_config(args, signal, num_classes, state_dict):
    """The configuration of a network whose weights are known: it needs none of the files it started from."""
    args = replace(args, standard_pretrained=False, **dict.fromkeys(_MATRICES, [None] * args.n_blocks))
    config = network_config(args, signal, num_classes)
    matches = (re.fullmatch(r"blocks\.(\d+)\..*\.basis", name) for name in state_dict)
    bases = {int(match[1]): state_dict[match[0]] for match in matches if match}
    if not bases:
        return config
    blocks = tuple(replace(block, projection_basis=bases.get(i)) for i, block in enumerate(config.blocks))
    return replace(config, blocks=blocks)
