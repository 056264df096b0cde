"""Checkpoints of the authors' program: their names and shapes of weights as ours."""

import re

import torch

from models.projection import Projection
from utils.errors import UserError

_BLOCK = re.compile(r"module\.(\d+)\.(.+)")
_UNUSED = re.compile(r".*\.(phis|psis)|(.*\.)?non_linearity\d*\.(gain|bias)")


def plain_names(state_dict):
    """The weights without the names that torch.compile and DistributedDataParallel put before theirs."""
    state_dict = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}
    while state_dict and all(name.startswith("module.") and not _BLOCK.fullmatch(name) for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    return state_dict


def is_original(state_dict):
    """Whether the names are those of the authors' program."""
    return any(name.startswith("module.") or _UNUSED.fullmatch(name) for name in state_dict)


def convert_original(state_dict, network, source="the checkpoint", loose=False):
    """The authors' names and shapes of weights as those of `network`.

    Raises UserError for what has no counterpart, unless it is `loose`: then it is left out.
    """
    own = network.state_dict()
    converted = {name: own[name] for name in _identities(network)}
    for name, value in state_dict.items():
        new_name = name if name in own else _converted_name(name, own)
        if new_name in own:
            converted[new_name] = _converted_value(value, own[new_name])
        elif not (loose or _UNUSED.fullmatch(name)):
            raise UserError(f"{source}: the authors' {name} has no counterpart in this network")
    return converted


def _identities(network):
    """Names of the weights of projections that are fixed to the identity, which the authors do not store."""
    return [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, Projection)
        and not module.weight.requires_grad
        and module.weight.shape[0] == module.weight.shape[1]
        and torch.equal(module.weight, torch.eye(len(module.weight), dtype=module.weight.dtype))
    ]


def _converted_name(name, own):
    """Our name of the authors' weight `name`, among the names `own`; None if there is not exactly one."""
    match = _BLOCK.fullmatch(name)
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
    ends = {"param": "(P|Pr|Pc)\\.weight", "mean": "Std\\.mean", "var": "Std\\.var", "frame": "FrhoF\\.frame"}
    found = [own_name for own_name in own if re.fullmatch(rf"blocks\.{block}\.(.*\.)?{ends.get(kind, '')}", own_name)]
    return found[0] if len(found) == 1 else None


def _converted_value(value, own):
    """The authors' tensor as ours: complex numbers instead of a last dimension of 2, projections as matrices."""
    if own.is_complex() and value.dim() and value.shape[-1] == 2:
        value = torch.view_as_complex(value.contiguous())
    return value.reshape(own.shape) if value.numel() == own.numel() else value
