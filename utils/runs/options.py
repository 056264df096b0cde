"""The options of `main_block.py` and `resample.py`: tables, and what a command line must satisfy. Imports no torch.

Arguments are frozen records of plain values, named as the flags with '_' for '-' (`--Pr-size` is `args.Pr_size`).
"""

import os
import re
import secrets
import time
from dataclasses import replace
from itertools import accumulate

from models import names
from models.signal import output_size
from utils.data.names import BAD_IMAGES, DATASETS, IN_FOLDERS, WITH_FLAGS
from utils.errors import UserError
from utils.runs import values as to
from utils.runs.authors import FOREIGN, upgraded
from utils.runs.command import CommandLine, Group, Option, grouped

BLOCKS, STANDARD = "blocks", "standard"  # the two kinds of networks
INTERVAL = "START:STOP[:STEP]"


def _per_block(flags, type, default, help, metavar="N", **more):
    return Option(flags, type, default, help, metavar, per_block=True, **more)


def _modules(flags, help):
    return Option(flags, to.module_names, [], help, "ARCH")


# fmt: off
_DATA = Option("--data", to.path, None, "ImageNet: the folder with train/ and val/; ImageNet32: the folder of its "
               "batches", "DIR", free=True)
_DATA_DIR = Option("--data-dir", to.path, "data", "folder of CIFAR and MNIST, downloaded if missing", "DIR", free=True)
_WORKERS = Option("-j --workers", to.few, 4, "processes that read ImageNet", "N", free=True)
_DEVICE = Option("--device", to.text, "auto", "cpu, cuda, cuda:N, mps, or auto: the best available", free=True)
_CHECKPOINTS = Option("--checkpoints", to.path, "checkpoints", "folder of the runs' folders", "DIR", free=True)

TRAINING = CommandLine("main_block.py", "Trains one network of the paper.", grouped(
    Group("network"),
    Option("-a --arch", to.architecture, None, "modules of a block, e.g. 'Fw Std Pr N', or a standard network, e.g. "
           "resnet18-custom (modules: " + " ".join(names.MODULES) + ")", required=True),
    Group("blocks", BLOCKS, "here and below, lists have a value per block; blocks that they leave out have the "
          "default"),
    Option("--n-blocks", to.positive_int, 1, "number of blocks", "J"),
    _modules("--first-arch", "the first block, instead of --arch"),
    _modules("--last-arch", "the last block, instead of --arch"),
    _modules("--phi-arch", "modules for the low-pass part of Fw"),
    _modules("--psi-arch", "modules for the band-pass part of Fw, e.g. mod"),
    _modules("--linear-arch", "modules for the linear half of rho"),
    _modules("--non-linear-arch", "modules for the non-linear half of rho"),
    _modules("--left-arch", "modules of the left branch of B"),
    _modules("--right-arch", "modules of the right branch of B"),
    Group("wavelets", BLOCKS),
    _per_block("--scattering-wph", to.bit, True, "1: Fw keeps the phase of the wavelet coefficients; 0: it "
               "gives their modulus, as if --psi-arch began with mod"),
    _per_block("--scat-angles", to.few, 8, "number of angles L of Fw; 0: low-pass only"),
    _per_block("--scat-full-angles", to.bit, False, "1: angles over [0, 2π) instead of [0, π)"),
    Option("--scattering-scales-per-octave", to.width, 1, "scales per octave unless factorised", "S"),
    Option("--factorize-filters", to.natural, None, "blocks from this one on (from 0) have half an octave", "F"),
    Group("non-linearity", BLOCKS),
    _per_block("--scat-non-linearity", to.text, "mod", "non-linearity of mod and rho: "
               + ", ".join(names.NON_LINEARITIES), "NAME", choices=tuple(names.NON_LINEARITIES)),
    _per_block("--scat-non-linearity-bias", to.finite_float, None, "its bias", "B"),
    _per_block("--scat-non-linearity-gain", to.finite_float, None, "its gain", "G"),
    _per_block("--scat-non-linearity-learned", to.bit, False, "1: its bias and gain are learned, per channel"),
    _per_block("--dictionary-size", to.width, 2048, "atoms of FrhoF's frame"),
    Option("--non-linearity", to.text, "relu", "non-linearity of FrhoF", choices=names.FRAME_NON_LINEARITIES,
           fills="dictionary_non_linearity"),
    _per_block("--lambda-star", to.finite_float, 1.0, "threshold of FrhoF's non-linearity, times √(atoms)", "L",
               fills="dictionary_threshold"),
    _per_block("--non-lin-delta", to.positive_float, 0.01, "width of FrhoF's gate, triang and sigmo", "D",
               fills="dictionary_delta"),
    _per_block("--dict-norm", to.non_negative_float, 0.0, "greatest ratio of two atoms' norms in FrhoF's frame; 0: any",
               "R", fills="dictionary_norms"),
    Group("standardisation, input", BLOCKS),
    Option("--homogeneous", None, False, "Std keeps the mean at 0"),
    Option("--mix-input", None, False, "a learned 1×1 convolution of the input channels first"),
    Option("--yuv", None, False, "the input's colours as YUV (fixed)"),
    Group("projections", BLOCKS, "files are .npy, .npz or .pt with one matrix; none: no file"),
    _per_block("--L-proj-size", to.channels, None, "number of channels of P, one for all blocks or one each; id: the "
               "identity", fills="P_size", complete=True),
    _per_block("--Pr-size", to.channels, None, "number of channels of Pr; id: the identity", complete=True),
    _per_block("--Pc-size", to.channels, None, "number of channels of Pc; id: the identity", complete=True),
    _per_block("--remove-L", to.bit, False, "1: the block has no projection", fills="remove_projection"),
    _per_block("--freeze-P", to.bit, False, "1: the projection is not learned", fills="freeze_projection"),
    _per_block("--P-eigenvectors", to.matrix_file, None, "eigenvectors in rows: a fixed projection on them "
               "precedes the learned one", "FILE", fills="projection_basis"),
    _per_block("--P-eigenvectors-start", to.natural, None, "the first eigenvector used (default 0)"),
    _per_block("--P-eigenvectors-end", to.positive_int, None, "the one after the last eigenvector used"),
    _per_block("--P-eigenvalues", to.matrix_file, None, "initial weights are Gaussian with these variances of the "
               "input channels (or eigenvectors)", "FILE", fills="projection_eigenvalues"),
    _per_block("--P-initialization", to.matrix_file, None, "initial weights are this matrix", "FILE",
               fills="projection_initialization"),
    Option("--pars-reg", None, False, "Parseval regularisation W ← (1 + β) W − β W Wᴴ W after every step"),
    Option("--quadrature-reg", None, False, "quadrature regularisation W ← W − β W Wᵀ W̄ after every step"),
    Option("--beta", to.positive_float, 0.01, "β of the regularisation"),
    Group("classifier", BLOCKS),
    Option("--classifier-batch-norm", to.text, "affine", "batch norm before the linear layer; std: no affine map",
           choices=names.CLASSIFIER_BATCH_NORMS),
    Option("--no-classifier-bias", None, True, "no bias", dest="classifier_bias", opposite="--classifier-bias"),
    Option("--avgpool", None, False, "average over space before the linear layer", fills="average_pooling"),
    Option("--avg-ker-size", to.positive_int, 1, "average over windows of K × K pixels instead", "K",
           fills="average_kernel"),
    Option("--identity-classifier", None, False, "no linear layer: a class for each number that leaves the blocks"),
    Group("standard networks", STANDARD),
    Option("--standard-width-scaling", to.scale, 1.0, "factor of all widths", "S", fills="width"),
    Option("--standard-batch-norm", to.text, "pre", "batch norm before (pre) or after (post) the non-linearity, or "
           "none", choices=names.BATCH_NORMS),
    Option("--standard-no-bias", None, False, "no biases, batch norm without affine map"),
    Option("--standard-classifier-no-bias", None, False, "no bias in the last layer"),
    Option("--standard-non-linearity", to.text, "relu", "pointwise function; of several, layers take turns: "
           + ", ".join(names.STANDARD_NON_LINEARITIES), "NAME",
           choices=tuple(names.STANDARD_NON_LINEARITIES), many=True, combine=to.one_or_many),
    Option("--standard-init-gain", to.finite_float, 1.0, "initial gain of the functions that have one", "G"),
    Option("--standard-init-bias", to.finite_float, 0.0, "initial bias of the functions that have one", "B"),
    Option("--standard-pretrained", None, False, "torchvision's weights"),
    Group("data"),
    Option("--dataset", to.lower_case, None, "the data set", choices=DATASETS, shortcuts=WITH_FLAGS),
    _DATA,
    _DATA_DIR,
    Option("--grayscale", None, False, "one channel instead of three"),
    Option("--data-subset", to.images_of, None, "only these images of every class of the training set; 'range(A, B)' "
           "or '[I, …]': only these of the whole set", INTERVAL),
    Option("--classes-subset", to.class_or_classes, None, "only these classes, renumbered; or the numbers of some, "
           "which keep them", INTERVAL, many=True, combine=to.classes_of),
    Option("--resize-images", to.width, None, "images of SIZE × SIZE", "SIZE"),
    Option("--randomize-labels", to.natural, None, "random labels", "SEED"),
    Option("--bad-images", to.text, "error", "action on unreadable image files", choices=BAD_IMAGES, free=True),
    _WORKERS,
    Group("training"),
    Option("--epochs", to.natural, 90, "number of epochs", "N", free=True),
    Option("-b --batch-size", to.positive_int, 256, "images per step, over all processes together", "N"),
    Option("--lr --learning-rate", to.non_negative_float, 0.1, "initial learning rate"),
    Option("--learning-rate-adjust-frequency", to.positive_int, 30, "epochs between its divisions by 10", "EPOCHS"),
    Option("--momentum", to.non_negative_float, 0.9, "SGD momentum"),
    Option("--wd --weight-decay", to.non_negative_float, 1e-4, "weight decay", dest="weight_decay"),
    Option("--seed", to.seed, 0, "random seed for weights, batches and augmentation"),
    Group("hardware"),
    _DEVICE,
    Option("--amp", None, False, "bfloat16 where it is safe (autocast)", free=True),
    Option("--compile", None, False, "compile a standard network (torch.compile); blocks are not compiled", free=True),
    Option("--tf32", None, False, "TensorFloat-32 in all products of CUDA GPUs (default: in convolutions)", free=True),
    Group("run"),
    Option("--dir", to.path, None, "name of the run (default: from data, network and time)", "NAME", free=True),
    _CHECKPOINTS,
    Option("--resume", to.path, None, "checkpoint to start from: a file or a run, as it is or in --checkpoints; "
           "also one of the authors' program", "FILE"),
    Option("--restart", None, False, "take only the weights of --resume"),
    Option("--loose-resume", None, False, "take what fits of the weights of --resume, and leave the rest as drawn"),
    Option("--overwrite", None, False, "start the run in --dir over (default: continue it)", free=True),
    Option("-e --evaluate", None, False, "validate (--resume FILE or --dir), do not train", free=True),
    Option("-p --print-freq", to.positive_int, 100, "steps between two lines of progress", "STEPS", free=True),
    Option("--tensorboard", None, False, "write curves for TensorBoard too", free=True),
), length="epochs", usage="%(prog)s -a ARCH --digits [options]", examples=(
    "python main_block.py --digits --epochs 15 -a 'Fw Std Pr N' --psi-arch mod --Pr-size 32 --dir digits",
    "python main_block.py --cifar10 --arch resnet18-custom --standard-width-scaling 0.5 --device cuda --dir resnet",
    "python main_block.py --digits -a 'Fw Std Pr N' --psi-arch mod --Pr-size 32 --evaluate --dir digits",
), foreign=FOREIGN, upgraded=upgraded)

SAMPLING = CommandLine("resample.py", "Samples rainbow networks of a trained experiment.", (
    Option("--experiment", to.path, None, "run to sample from", "NAME", required=True),
    Option("--dir", to.path, None, "folder of samples (default resamplings/resample-EXPERIMENT)", "NAME", free=True),
    _CHECKPOINTS,
    Option("--epoch", to.epoch, None, "sample from this epoch (default: the last, -1)", "E"),
    Option("--num-atoms", to.width, None, "widths of all layers but the classifier (default: the trained)",
           "N", many=True),
    Option("--method", to.text, "gaussian", "rows of weights: gaussian; orthogonal, a random isometry; white, no "
           "covariance", choices=("gaussian", "orthogonal", "white")),
    Option("--num-repeats", to.positive_int, 1, "number of samples", "R", free=True),
    Option("--num-simultaneous", to.positive_int, 1, "factor of that number", "K", free=True),
    Option("--align-test", None, False, "align on the test set instead of the training set"),
    Option("-b --batch-size", to.positive_int, 128, "images at a time", "N"),
    Option("--seed", to.seed, 0, "random seed of the weights"),
    _DEVICE,
    _WORKERS,
    replace(_DATA, help="folder of the data, if it has moved (see main_block.py)"),
    replace(_DATA_DIR, default=None, help="likewise"),
    Option("--overwrite", None, False, "resample even if samples exist", free=True),
), length="num_repeats", usage="%(prog)s --experiment NAME [options]", examples=(
    "python resample.py --experiment digits",
    "python resample.py --experiment digits --num-repeats 5 --dir resamplings/five",
    "python resample.py --experiment digits --method white --dir resamplings/white",
))
# fmt: on


def parse(argv=None, environ=os.environ):
    """The arguments of a command line of `main_block.py` (default: the program's).

    In a SLURM array, task N trains NAME-initN with a seed of its own. Raises UserError.
    """
    given = TRAINING.given(argv)
    _refuse_foreign(given)
    given.setdefault("dataset", "imagenet" if "data" in given else None)
    given["seed"] = given.get("seed", 0) + (array_task(environ) or 0)
    if "dir" in given:
        given["dir"] += _array_suffix(environ)
    args = TRAINING.resolve(given)
    _check(args)
    if not is_standard(args):
        _check_sizes(args)
    return args


def parse_sampling(argv=None):
    """The arguments of a command line of `resample.py` (default: the program's). Raises UserError."""
    given = SAMPLING.given(argv)
    given["num_repeats"] = given.get("num_repeats", 1) * given.pop("num_simultaneous", 1)
    return SAMPLING.resolve({"dir": f"resamplings/resample-{given['experiment']}", **given})


def changes(script, stored, argv):
    """{field: (before, after)} of what defines a run and differs between its `stored` arguments and a command line.

    Empty if the command (`script` and the words `argv`) resumes the run; how far it goes (`CommandLine.length`) does
    not matter. stored: "args" of its args.json. Raises UserError if they are of another script.
    """
    command = {"main_block.py": TRAINING, "resample.py": SAMPLING}[script]
    now = parse(argv, {}) if command is TRAINING else parse_sampling(argv)
    return command.changes(command.restore(stored, "args.json"), now)


def array_task(environ=os.environ):
    """The number of this task in a SLURM array, None outside of one."""
    task = environ.get("SLURM_ARRAY_TASK_ID", "")
    return int(task) if task.isdigit() else None


def _array_suffix(environ):
    task = array_task(environ)
    return "" if task is None else f"-init{task}"


def made_up_name(args, environ=os.environ):
    """A unique name for a run that was given none: data, network and time."""
    arch = re.sub(r"\W+", "-", arch_name(args))
    return f"{args.dataset}-{arch}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}{_array_suffix(environ)}"


def is_standard(args):
    """Whether the network is a standard one (ResNet, VGG, torchvision's) rather than made of blocks."""
    return isinstance(args.arch, str)


def arch_name(args):
    """The architecture as it is written on the command line."""
    return args.arch if is_standard(args) else " ".join(args.arch)


def block_archs(args):
    """The list of modules of each block."""
    archs = [args.arch] * args.n_blocks
    archs[0] = args.first_arch or archs[0]
    archs[-1] = args.last_arch or archs[-1]
    return archs


def block_kinds(n_blocks, first):
    """The kinds of the blocks' wavelet transforms: plain, from block `first` on (None: none) steps 0, 1 of octaves."""
    return [names.PLAIN if first is None or index < first else (index - first) % 2 for index in range(n_blocks)]


def image_sizes(size, n_blocks, first):
    """The height of an image after each block, for an input of height `size`."""
    return list(accumulate(block_kinds(n_blocks, first), lambda m, kind: output_size(m, kind != 0), initial=size))[1:]


def size_option(module):
    """The option that gives the size of a projection, P, Pr or Pc."""
    return next(option for option in TRAINING.options if option.config == f"{module}_size")


def _refuse_foreign(given):
    arch, standard = given["arch"], isinstance(given["arch"], str)
    foreign = BLOCKS if standard else STANDARD
    for field, value in given.items():
        option = TRAINING.by_field[field]
        if option.group.network == foreign and value != option.default:
            network = f"{arch}, which has no blocks" if standard else "a network of blocks"
            raise UserError(f"{option.flag} does not apply to {network}")


def _check(args):
    """Options agree with one another."""
    in_folder, has_data, one_block = args.dataset in IN_FOLDERS, args.data is not None, args.n_blocks == 1
    bounds = [bound for bound in args.P_eigenvectors_start + args.P_eigenvectors_end if bound is not None]
    for is_wrong, message in (
        (args.dataset is None, "no data set: --digits needs nothing, --cifar10 downloads it, --data DIR is ImageNet"),
        (in_folder and not has_data, f"--dataset {args.dataset} needs its folder, --data DIR"),
        (has_data and not in_folder, f"--data is ImageNet's folder; that of {args.dataset} is --data-dir"),
        (args.restart and not args.resume, "--restart takes the weights of --resume FILE, which is missing"),
        (args.loose_resume and not args.resume, "--loose-resume takes weights of --resume FILE, which is missing"),
        (args.evaluate and not (args.resume or args.dir), "--evaluate needs --resume FILE, or a run, --dir NAME"),
        (args.pars_reg and args.quadrature_reg, "--pars-reg is not allowed with --quadrature-reg"),
        (one_block and args.first_arch and args.last_arch, "--first-arch and --last-arch both replace the only block"),
        (bounds and not any(args.P_eigenvectors), "--P-eigenvectors-start and -end need --P-eigenvectors"),
    ):
        if is_wrong:
            raise UserError(message)


def _check_sizes(args):
    """Every projection has its size, and every size its projection."""
    sides = (args.phi_arch, args.psi_arch, args.linear_arch, args.non_linear_arch, args.left_arch, args.right_arch)
    used = {name for arch in (*block_archs(args), *sides) for name in arch}
    for name in names.PROJECTIONS:
        option = size_option(name)
        given = any(size is not None for size in getattr(args, option.field))
        if name in used and not given:
            raise UserError(f"the module {name} needs its number of channels, {option.flag}")
        if given and name not in used:
            raise UserError(f"{option.flag} is the size of the module {name}, which is not in --arch")
