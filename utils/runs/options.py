"""The command line of `main_block.py`: parsed, checked at once, and resolved into one namespace of plain values.

Names are the flags' with '_' for '-' (`--Pr-size` is `args.Pr_size`). Lists with one value per block may be given in
full or once for all blocks; resolved, they are always in full.
"""

import argparse
import math
import os
import pickle

import numpy as np
import torch

from models.config import BlockConfig, ScatNetConfig, StandardConfig
from models.names import (
    BATCH_NORMS,
    CLASSIFIER_BATCH_NORMS,
    FRAME_NON_LINEARITIES,
    IDENTITY,
    MODULES,
    NON_LINEARITIES,
    PLAIN,
    PROJECTIONS,
    STANDARD_NON_LINEARITIES,
    check_names,
)
from utils.data.names import BAD_IMAGES, DATASETS, IN_FOLDERS, WITH_FLAGS
from utils.errors import UserError, as_user_error, first_line

SIZE_FLAGS = {"P": "L_proj_size", "Pr": "Pr_size", "Pc": "Pc_size"}
NOTHING = "none"  # in a list of files: no file for this block


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line of `UserError` instead of a usage dump."""

    def error(self, message):
        raise UserError(f"{message} (--help lists all options)")


def _number(kind, low, strict, what):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not math.isfinite(value) or value < low or (strict and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


positive_int = _number(int, 1, False, "a positive integer")
natural = _number(int, 0, False, "an integer of at least 0")
positive_float = _number(float, 0, True, "a positive number")
non_negative_float = _number(float, 0, False, "a number of at least 0")
finite_float = _number(float, -math.inf, False, "a finite number")


def channels(text):
    """A number of channels, or 'id' for the identity."""
    return IDENTITY if text == IDENTITY else positive_int(text)


def switch(text):
    """0 or 1, as a bool."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or 1")
    return text == "1"


def module_names(text):
    """A list of modules of the block grammar, written as one string."""
    names = text.split()
    try:
        check_names(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def architecture(text):
    """Blocks as a list of modules, or the name of a standard network as a string."""
    words = text.split()
    if not words:
        raise argparse.ArgumentTypeError("empty; for example 'Fw Std Pr N', or resnet18-custom")
    if len(words) == 1 and words[0] not in MODULES and text == text.lower():
        return words[0]
    return module_names(text)


def interval(text):
    """START:STOP[:STEP] as [start, stop, step], each an integer or None, as in Python's slices."""
    parts = text.split(":")
    try:
        if len(parts) not in (2, 3):
            raise ValueError
        start, stop, step = ([int(part) if part else None for part in parts] + [None])[:3]
        if step is not None and step <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP or START:STOP:STEP (STEP > 0)") from None
    return [start, stop, step]


def parser():
    """The parser of `main_block.py`."""
    top = Parser(
        prog="main_block.py",
        usage="%(prog)s -a ARCH --digits [options]",
        allow_abbrev=False,
        description="Trains one network of the paper.",
    )
    _add_network_options(top)
    _add_projection_options(top)
    _add_classifier_options(top)
    _add_standard_options(top)
    _add_data_options(top)
    _add_training_options(top)
    _add_run_options(top)
    return top


PER_BLOCK = {}  # dest -> value of a block for which nothing is given


def _per_block(group, flag, default, **keywords):
    """An option with a value per block, or one for all."""
    dest = flag.removeprefix("--").replace("-", "_")
    PER_BLOCK[dest] = default
    group.add_argument(flag, nargs="+", metavar=keywords.pop("metavar", "N"), **keywords)


def _add_network_options(top):
    group = top.add_argument_group("network", "lists: a value per block, or one for all blocks")
    group.add_argument(
        "-a",
        "--arch",
        type=architecture,
        required=True,
        help="modules of a block, e.g. 'Fw Std Pr N' (names: " + " ".join(MODULES) + "), or the name of "
        "a standard network, e.g. resnet18-custom",
    )
    group.add_argument("--n-blocks", type=positive_int, default=1, metavar="J", help="number of blocks (default 1)")
    for flag, what in (
        ("--first-arch", "the first block, instead of --arch"),
        ("--last-arch", "the last block, instead of --arch"),
        ("--phi-arch", "modules for the low-pass part of Fw"),
        ("--psi-arch", "modules for the band-pass part of Fw, e.g. mod"),
        ("--linear-arch", "modules for the linear half of rho"),
        ("--non-linear-arch", "modules for the non-linear half of rho"),
        ("--left-arch", "modules of the left branch of B"),
        ("--right-arch", "modules of the right branch of B"),
    ):
        group.add_argument(flag, type=module_names, default=[], metavar="ARCH", help=what)
    _per_block(
        group,
        "--scattering-wph",
        True,
        type=switch,
        help="1: Fw gives the wavelet coefficients with their phase; 0: their modulus, as if --psi-arch began "
        "with mod (default 1)",
    )
    _per_block(group, "--scat-angles", 8, type=natural, help="number of angles L of Fw; 0: low-pass only (default 8)")
    _per_block(group, "--scat-full-angles", False, type=switch, help="1: angles over [0, 2π) instead of [0, π)")
    group.add_argument(
        "--scattering-scales-per-octave",
        type=positive_int,
        default=1,
        metavar="S",
        help="scales per octave of the blocks that are not factorised (default 1)",
    )
    group.add_argument(
        "--factorize-filters",
        type=natural,
        metavar="F",
        help="blocks from this one on (from 0) have half an octave each; default: none",
    )
    _per_block(
        group,
        "--scat-non-linearity",
        "mod",
        choices=NON_LINEARITIES,
        metavar="NAME",
        help="non-linearity of mod and rho: " + ", ".join(NON_LINEARITIES) + " (default mod)",
    )
    _per_block(group, "--scat-non-linearity-bias", None, type=finite_float, metavar="B", help="its bias")
    _per_block(group, "--scat-non-linearity-gain", None, type=finite_float, metavar="G", help="its gain")
    _per_block(
        group, "--scat-non-linearity-learned", False, type=switch, help="1: its bias and gain are learned, per channel"
    )
    group.add_argument("--homogeneous", action="store_true", help="Std keeps the mean at 0")
    group.add_argument("--mix-input", action="store_true", help="a learned 1×1 convolution of the input channels first")
    group.add_argument("--yuv", action="store_true", help="the input's colours as YUV (fixed)")
    group.add_argument("--dictionary-size", type=positive_int, nargs="+", metavar="N", help="atoms of FrhoF's frame")
    PER_BLOCK["dictionary_size"] = 2048
    group.add_argument(
        "--non-linearity",
        choices=tuple(FRAME_NON_LINEARITIES),
        default="relu",
        help="non-linearity of FrhoF (default relu)",
    )


def _add_projection_options(top):
    group = top.add_argument_group("projections", "files are .npy, .npz or .pt with one matrix; none: no file")
    for flag, what in (("--L-proj-size", "P"), ("--Pr-size", "Pr"), ("--Pc-size", "Pc")):
        _per_block(group, flag, None, type=channels, help=f"number of channels of {what}; id: the identity")
    _per_block(group, "--remove-L", False, type=switch, help="1: the block has no projection")
    _per_block(
        group,
        "--freeze-P",
        False,
        type=switch,
        help="1: the projection is not learned (a list that stops early leaves the rest learned)",
    )
    _per_block(
        group,
        "--P-eigenvectors",
        None,
        metavar="FILE",
        help="eigenvectors in columns: a fixed projection on them precedes the learned one",
    )
    _per_block(group, "--P-eigenvectors-start", None, type=natural, help="the first eigenvector used (default 0)")
    _per_block(group, "--P-eigenvectors-end", None, type=positive_int, help="the one after the last eigenvector used")
    _per_block(
        group,
        "--P-eigenvalues",
        None,
        metavar="FILE",
        help="weights start Gaussian with these variances of the input channels (or eigenvectors)",
    )
    _per_block(group, "--P-initialization", None, metavar="FILE", help="weights start at this matrix")
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--pars-reg", action="store_true", help="Parseval regularisation W ← (1 + β) W − β W Wᴴ W after every step"
    )
    exclusive.add_argument(
        "--quadrature-reg", action="store_true", help="quadrature regularisation W ← W − β W Wᵀ W̄ after every step"
    )
    group.add_argument("--beta", type=positive_float, default=0.01, help="β of the regularisation (default 0.01)")


def _add_classifier_options(top):
    group = top.add_argument_group("classifier")
    group.add_argument(
        "--classifier-batch-norm",
        choices=CLASSIFIER_BATCH_NORMS,
        default="affine",
        help="batch norm before the linear layer; std: without affine map (default affine)",
    )
    group.add_argument("--no-classifier-bias", dest="classifier_bias", action="store_false", help="no bias")
    group.add_argument("--avgpool", action="store_true", help="average over space before the linear layer")


def _add_standard_options(top):
    group = top.add_argument_group("standard networks")
    group.add_argument(
        "--standard-width-scaling", type=positive_float, default=1.0, metavar="S", help="multiplies all widths"
    )
    group.add_argument(
        "--standard-batch-norm",
        choices=BATCH_NORMS,
        default="pre",
        help="batch norm before (pre, the default) or after (post) the non-linearity, or none",
    )
    group.add_argument("--standard-no-bias", action="store_true", help="no biases, batch norm without affine map")
    group.add_argument("--standard-classifier-no-bias", action="store_true", help="no bias in the last layer")
    group.add_argument(
        "--standard-non-linearity",
        choices=STANDARD_NON_LINEARITIES,
        default="relu",
        help="pointwise non-linearity (default relu)",
    )
    group.add_argument("--standard-pretrained", action="store_true", help="torchvision's weights")


def _add_data_options(top):
    group = top.add_argument_group("data")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--dataset", choices=DATASETS, help="the data set")
    for name in WITH_FLAGS:
        choice.add_argument(f"--{name}", dest="dataset", action="store_const", const=name, help=f"--dataset {name}")
    group.add_argument(
        "--data", metavar="DIR", help="ImageNet: the folder with train/ and val/; ImageNet32: the folder of its batches"
    )
    group.add_argument(
        "--data-dir",
        default="data",
        metavar="DIR",
        help="where CIFAR and MNIST are, downloaded if missing (default data)",
    )
    group.add_argument("--grayscale", action="store_true", help="one channel instead of three")
    group.add_argument(
        "--data-subset",
        type=interval,
        metavar="START:STOP[:STEP]",
        help="only these images of every class of the training set",
    )
    group.add_argument("--classes-subset", type=interval, metavar="START:STOP[:STEP]", help="only these classes")
    group.add_argument("--resize-images", type=positive_int, metavar="SIZE", help="images of SIZE × SIZE")
    group.add_argument("--randomize-labels", type=natural, metavar="SEED", help="random labels for training")
    group.add_argument(
        "--bad-images",
        choices=BAD_IMAGES,
        default="error",
        help="what to do about ImageNet's files that are no readable image (default error)",
    )
    group.add_argument(
        "-j", "--workers", type=natural, default=4, metavar="N", help="processes that read ImageNet (default 4)"
    )


def _add_training_options(top):
    group = top.add_argument_group("training")
    group.add_argument("--epochs", type=natural, default=90, metavar="N", help="epochs in all (default 90)")
    group.add_argument(
        "-b",
        "--batch-size",
        type=positive_int,
        default=256,
        metavar="N",
        help="images per step, over all processes together (default 256)",
    )
    group.add_argument(
        "--lr", "--learning-rate", type=non_negative_float, default=0.1, help="initial learning rate (default 0.1)"
    )
    group.add_argument(
        "--learning-rate-adjust-frequency",
        type=positive_int,
        default=30,
        metavar="EPOCHS",
        help="the learning rate is divided by 10 every so many epochs (default 30)",
    )
    group.add_argument("--momentum", type=non_negative_float, default=0.9, help="of SGD (default 0.9)")
    group.add_argument(
        "--wd",
        "--weight-decay",
        dest="weight_decay",
        type=non_negative_float,
        default=1e-4,
        help="weight decay (default 1e-4)",
    )
    group.add_argument("--seed", type=natural, default=0, help="of weights, batches and augmentation (default 0)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default: the best there is)")
    group.add_argument("--amp", action="store_true", help="bfloat16 where it is safe (autocast)")
    group.add_argument("--compile", action="store_true", help="compile the network (torch.compile)")
    group.add_argument("--tf32", action="store_true", help="TensorFloat-32 products on GPUs that have them")


def _add_run_options(top):
    group = top.add_argument_group("run")
    group.add_argument("--dir", metavar="NAME", help="name of the run (default: from network, data and time)")
    group.add_argument(
        "--checkpoints", default="checkpoints", metavar="DIR", help="folder of the runs' folders (default checkpoints)"
    )
    group.add_argument(
        "--resume",
        metavar="FILE",
        help="start from this checkpoint (a file or a run, also of --checkpoints; the original's too)",
    )
    group.add_argument("--restart", action="store_true", help="of --resume take the weights only")
    group.add_argument(
        "--overwrite", action="store_true", help="start the run in --dir anew (without: go on where it stopped)"
    )
    group.add_argument("-e", "--evaluate", action="store_true", help="validate (--resume FILE or --dir), do not train")
    group.add_argument(
        "-p",
        "--print-freq",
        type=positive_int,
        default=100,
        metavar="STEPS",
        help="steps between two lines of progress (default 100)",
    )
    group.add_argument("--tensorboard", action="store_true", help="write curves for TensorBoard too")


def parse(argv=None, environ=os.environ):
    """The resolved arguments of a command line (default: the program's).

    In a SLURM array, task N trains NAME-initN with a seed of its own. Raises UserError.
    """
    args = parser().parse_args(argv)
    defaults = parser().parse_args(["-a", "id"])
    _check_data(args)
    if isinstance(args.arch, str):
        _refuse_foreign(args, defaults, lambda dest: dest in BLOCK_OPTIONS, f"{args.arch}, which has no blocks")
    else:
        _refuse_foreign(args, defaults, lambda dest: dest.startswith("standard_"), "a network of blocks")
        _check_modules(args)
    if not args.P_eigenvectors and (args.P_eigenvectors_start or args.P_eigenvectors_end):
        raise UserError("--P-eigenvectors-start and -end choose among --P-eigenvectors, which is missing")
    for dest, default in PER_BLOCK.items():
        setattr(args, dest, _in_full(dest, getattr(args, dest), default, args.n_blocks))
    if args.restart and not args.resume:
        raise UserError("--restart takes the weights of --resume FILE, which is missing")
    if args.evaluate and not (args.resume or args.dir):
        raise UserError("--evaluate needs a checkpoint, --resume FILE, or a run, --dir NAME")
    task = environ.get("SLURM_ARRAY_TASK_ID", "")
    if task.isdigit():
        args.seed += int(task)
        args.dir = f"{args.dir}-init{task}" if args.dir else None
    return args


BLOCK_OPTIONS = frozenset(
    "n_blocks first_arch last_arch phi_arch psi_arch linear_arch non_linear_arch left_arch right_arch scattering_wph "
    "scat_angles scat_full_angles scattering_scales_per_octave factorize_filters scat_non_linearity "
    "scat_non_linearity_bias scat_non_linearity_gain scat_non_linearity_learned homogeneous mix_input yuv "
    "dictionary_size non_linearity L_proj_size Pr_size Pc_size remove_L freeze_P P_eigenvectors P_eigenvectors_start "
    "P_eigenvectors_end P_eigenvalues P_initialization pars_reg quadrature_reg beta classifier_batch_norm "
    "classifier_bias avgpool".split()
)


def _flag(dest):
    special = {"classifier_bias": "--no-classifier-bias"}
    return special.get(dest, "--" + dest.replace("_", "-"))


def _refuse_foreign(args, defaults, is_foreign, network):
    for dest, value in vars(args).items():
        if is_foreign(dest) and value != getattr(defaults, dest):
            raise UserError(f"{_flag(dest)} means nothing for {network}")


def _check_data(args):
    if args.dataset is None and args.data is None:
        raise UserError("no data set: --digits needs nothing, --cifar10 downloads it, --data DIR is ImageNet")
    args.dataset = args.dataset or "imagenet"
    if args.dataset in IN_FOLDERS and args.data is None:
        raise UserError(f"--dataset {args.dataset} needs its folder, --data DIR")
    if args.dataset not in IN_FOLDERS and args.data is not None:
        raise UserError(f"--data is ImageNet's folder; that of {args.dataset} is --data-dir")


def _check_modules(args):
    """Every projection has its size, and every size its projection."""
    if args.n_blocks == 1 and args.first_arch and args.last_arch:
        raise UserError("--first-arch and --last-arch both replace the only block: give more blocks (--n-blocks)")
    used = {name for arch in block_archs(args) for name in arch}
    for side in ("phi_arch", "psi_arch", "linear_arch", "non_linear_arch", "left_arch", "right_arch"):
        used.update(getattr(args, side))
    for name in PROJECTIONS:
        flag, given = _flag(SIZE_FLAGS[name]), getattr(args, SIZE_FLAGS[name]) is not None
        if name in used and not given:
            raise UserError(f"the module {name} needs its number of channels, {flag}")
        if given and name not in used:
            raise UserError(f"{flag} is the size of the module {name}, which is not in --arch")


def _in_full(dest, values, default, n_blocks):
    """The list of a per-block option, one value per block."""
    if values is None:
        return [default] * n_blocks
    if len(values) == 1:
        return values * n_blocks
    if dest == "freeze_P" and len(values) < n_blocks:
        return values + [False] * (n_blocks - len(values))
    if len(values) != n_blocks:
        blocks = "block" if n_blocks == 1 else "blocks"
        raise UserError(
            f"{_flag(dest)} has {len(values)} values for {n_blocks} {blocks} (--n-blocks): "
            f"give {n_blocks}, or one for all"
        )
    return values


def block_archs(args):
    """The list of modules of each block."""
    archs = [args.arch] * args.n_blocks
    if args.first_arch:
        archs[0] = args.first_arch
    if args.last_arch:
        archs[-1] = args.last_arch
    return archs


def arch_name(args):
    """The architecture as it is written on the command line."""
    return args.arch if isinstance(args.arch, str) else " ".join(args.arch)


def network_config(args, signal, num_classes):
    """The configuration of the network (for `models.build`) for images of type `signal`.

    Raises UserError for values that no network has and for files that cannot be read.
    """
    with as_user_error():
        if isinstance(args.arch, str):
            return StandardConfig(
                name=args.arch,
                num_classes=num_classes,
                input=signal,
                width=args.standard_width_scaling,
                batch_norm=args.standard_batch_norm,
                bias=not args.standard_no_bias,
                classifier_bias=not args.standard_classifier_no_bias,
                non_linearity=args.standard_non_linearity,
                pretrained=args.standard_pretrained,
            )
        return ScatNetConfig(
            input=signal,
            num_classes=num_classes,
            blocks=tuple(_block_config(args, index, arch) for index, arch in enumerate(block_archs(args))),
            classifier_batch_norm=args.classifier_batch_norm,
            classifier_bias=args.classifier_bias,
            average_pooling=args.avgpool,
            mix_input=args.mix_input,
            yuv=args.yuv,
            regularization="parseval" if args.pars_reg else "quadrature" if args.quadrature_reg else None,
            beta=args.beta,
        )


def _block_config(args, index, arch):
    factorized = args.factorize_filters is not None and index >= args.factorize_filters
    psi_arch = args.psi_arch if args.scattering_wph[index] else ["mod", *args.psi_arch]
    return BlockConfig(
        arch=tuple(arch),
        phi_arch=tuple(args.phi_arch),
        psi_arch=tuple(psi_arch),
        linear_arch=tuple(args.linear_arch),
        non_linear_arch=tuple(args.non_linear_arch),
        left_arch=tuple(args.left_arch),
        right_arch=tuple(args.right_arch),
        angles=args.scat_angles[index],
        full_angles=args.scat_full_angles[index],
        scales_per_octave=args.scattering_scales_per_octave,
        kind=(index - args.factorize_filters) % 2 if factorized else PLAIN,
        non_linearity=args.scat_non_linearity[index],
        non_linearity_bias=args.scat_non_linearity_bias[index],
        non_linearity_gain=args.scat_non_linearity_gain[index],
        non_linearity_learned=args.scat_non_linearity_learned[index],
        homogeneous=args.homogeneous,
        P_size=args.L_proj_size[index],
        Pr_size=args.Pr_size[index],
        Pc_size=args.Pc_size[index],
        remove_projection=args.remove_L[index],
        freeze_projection=args.freeze_P[index],
        projection_basis=_eigenvectors(args, index),
        projection_eigenvalues=_matrix(args.P_eigenvalues[index]),
        projection_initialization=_matrix(args.P_initialization[index]),
        orthogonal=args.pars_reg or args.quadrature_reg,
        dictionary_size=args.dictionary_size[index],
        dictionary_non_linearity=args.non_linearity,
    )


def _eigenvectors(args, index):
    """The chosen eigenvectors of a block as the rows of a projection (K, D); None without a file."""
    start, end = args.P_eigenvectors_start[index], args.P_eigenvectors_end[index]
    vectors = _matrix(args.P_eigenvectors[index])  # (D, R)
    if vectors is None:
        return None
    if vectors.dim() != 2 or not 0 <= (start or 0) < (end or vectors.shape[1]) <= vectors.shape[1]:
        raise UserError(f"{args.P_eigenvectors[index]}: shape {tuple(vectors.shape)} has no columns {start or 0}:{end}")
    return vectors[:, start:end].mH.contiguous()


def _matrix(path):
    """The one array in a file, float32 or complex64; no code in the file is run. None for no file."""
    if path in (None, NOTHING):
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
        raise UserError(f"{path}: refused, it holds other things than one matrix of numbers") from error
    except Exception as error:  # whatever a stranger's file makes its reader raise
        raise UserError(f"{path}: not a .npy, .npz or .pt file with one matrix ({first_line(error)})") from error
    return value.to(torch.cfloat if value.is_complex() else torch.float)
