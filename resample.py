"""Samples rainbow networks of a trained experiment: python resample.py --experiment NAME (--help lists the options).

Writes checkpoint_repeat{r}.pt, which `main_block.py --resume … --restart --freeze-P 1` trains the classifier of, and
accuracies.csv: the test accuracy after every layer (repeat, layers sampled, top-1, top-5 in percent).
"""

import copy
import csv
import io
import platform
import sys
import warnings
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import models
from models import rainbow_layers
from models.signal import Signal
from rainbow import RainbowError, weight_layers
from rainbow.alignment import MeanNetwork
from rainbow.moments import digest
from rainbow.running import device_of
from rainbow.sampling import METHODS, RainbowSampler
from rainbow.widths import checked_widths
from utils.data.datasets import load_datasets
from utils.device import describe_device, pick_device
from utils.errors import UserError, as_user_error, did_you_mean, run_main
from utils.files import atomic_write, read_json, write_json
from utils.lock import Lock
from utils.runs import options
from utils.runs.checkpoints import RunFolder, checkpoint_of, load_network, save
from utils.runs.log import RunLog

TOLERANCE = 2.0  # percent, between machines and precisions
COLUMNS = ("repeat", "layer", "acc1", "acc5")
# Options that say where and how often; the others define a sample.
FREE = frozenset("dir checkpoints overwrite num_repeats device workers data data_dir".split())


def parser():
    """The command line."""
    top = options.Parser(
        prog="resample.py", description="Samples rainbow networks of a trained experiment.", allow_abbrev=False
    )
    top.add_argument("--experiment", required=True, metavar="NAME", help="the run to sample from")
    top.add_argument("--dir", metavar="NAME", help="folder of the samples (default resamplings/resample-EXPERIMENT)")
    top.add_argument(
        "--checkpoints", default="checkpoints", metavar="DIR", help="folder of the runs' folders (default checkpoints)"
    )
    top.add_argument("--epoch", type=options.natural, metavar="E", help="sample from this epoch (default: the end)")
    top.add_argument(
        "--num-atoms",
        type=options.positive_int,
        nargs="+",
        metavar="N",
        help="widths of the layers before the classifier (default: the trained ones)",
    )
    top.add_argument(
        "--method",
        choices=METHODS,
        default="gaussian",
        help="rows of weights: gaussian; orthogonal, a random isometry; white, no covariance",
    )
    top.add_argument("--num-repeats", type=options.positive_int, default=1, metavar="R", help="samples (default 1)")
    top.add_argument("--align-test", action="store_true", help="align on the test set instead of the training set")
    top.add_argument(
        "-b", "--batch-size", type=options.positive_int, default=128, metavar="N", help="images at a time (default 128)"
    )
    top.add_argument("--seed", type=options.natural, default=0, help="of the weights (default 0)")
    top.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default: the best there is)")
    top.add_argument(
        "-j", "--workers", type=options.natural, default=4, metavar="N", help="processes that read ImageNet (default 4)"
    )
    top.add_argument("--data", metavar="DIR", help="the data's folder, where it has moved (see main_block.py)")
    top.add_argument("--data-dir", metavar="DIR", help="likewise")
    top.add_argument("--overwrite", action="store_true", help="sample anew what is there already")
    return top


@as_user_error(kind=RainbowError)
def main(argv=None):
    """Samples as the command line says. Returns the exit status; raises RunError."""
    rainbow_layers.register()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    args.dir = args.dir or f"resamplings/resample-{args.experiment}"
    source, folder = find_experiment(args), RunFolder(args.checkpoints, args.dir)
    network, trained_args = load_network(source, args.epoch, device)
    datasets = load_data(args, trained_args, source)
    network_args = resized_args(network, trained_args, args.num_atoms)
    sampler = prepare(args, network, datasets)
    check_accuracy(args, source, sampler)
    folder.create()
    with Lock(folder.path / "lock"):
        folder.clean()
        log = RunLog(folder)
        try:
            sample_all(args, argv, folder, log, sampler, network_args, device)
        except Exception as error:
            log.failed(f"{type(error).__name__}: {error}")
            raise
    return 0


def find_experiment(args):
    """The run to sample from. Raises UserError where it is not there, or not finished and no epoch is chosen."""
    source = RunFolder(args.checkpoints, args.experiment)
    if not (source.path / "args.json").is_file():
        root = RunFolder(args.checkpoints, "x").path.parent
        names = sorted(path.parent.relative_to(root).as_posix() for path in root.glob("**/args.json"))
        hint = did_you_mean(args.experiment, names)
        raise UserError(f"--experiment {args.experiment}: no such run in {root}{hint}")
    status = source.status()
    if args.epoch is None and status.get("state") != "finished":
        kept = ", ".join(map(str, source.epochs())) or "none"
        raise UserError(
            f"--experiment {args.experiment}: not finished (epoch {status.get('epoch')} of "
            f"{status.get('epochs')}, {status.get('state', 'not begun')}); train it to its end, or "
            f"choose one of the epochs kept with --epoch (there: {kept})"
        )
    return source


def load_data(args, trained_args, source):
    """The data that the experiment was trained on. Raises UserError where what is there now is other data."""
    places = {key: getattr(args, key) for key in ("data", "data_dir") if getattr(args, key) is not None}
    data_args = copy.copy(trained_args)
    vars(data_args).update(places)
    datasets = load_datasets(data_args)
    signal, trained = datasets.signal, Signal(*trained_args.input_shape)
    if signal != trained or datasets.num_classes != trained_args.num_classes:
        raise UserError(
            f"{source.path} was trained on {trained} and {trained_args.num_classes} classes, but "
            f"{datasets.name} now has {signal} and {datasets.num_classes} classes: it is other data"
        )
    return datasets


def prepare(args, network, datasets):
    """The sampler of the trained network over its data."""
    train, test = (
        images.loader(args.batch_size, workers=args.workers, device=device_of(network))
        for images in (datasets.train, datasets.val)
    )

    def progress(batches, text):
        return tqdm(batches, desc=text, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())

    return RainbowSampler(
        MeanNetwork.fit([network], train),
        train,
        test=test,
        method=args.method,
        widths=args.num_atoms,
        align_on_test=args.align_test,
        progress=progress,
    )


def check_accuracy(args, source, sampler):
    """Raises UserError where the trained network is far from the accuracy of its own last validation."""
    known, found = source.status().get("acc1"), sampler.trained_accuracy.acc1
    if args.epoch is None and known is not None and abs(known - found) > TOLERANCE:
        raise UserError(
            f"{source.path} was trained on other data: it reached {known:.2f} % then, but {found:.2f} % on "
            "the test set that is there now"
        )


def resized_args(network, trained_args, widths):
    """The arguments with which `main_block.py` builds a network of these widths. Raises UserError for none."""
    args = copy.deepcopy(trained_args)
    layers = weight_layers(network, torch.rand(2, *args.input_shape))
    own = checked_widths(None, layers)
    widths = checked_widths(widths, layers)
    if widths == own:
        return args
    if isinstance(args.arch, str):
        args.standard_width_scaling *= widths[0] / own[0]
        if standard_widths(args) != widths:
            raise UserError(
                f"--num-atoms: a {args.arch} has int(s·w) channels in every layer with one s; "
                f"s = {args.standard_width_scaling:g} gives {' '.join(map(str, standard_widths(args)))}"
            )
        return args
    for layer, width in zip(layers, widths):
        _, block, _, name = layer.name.split(".")
        getattr(args, options.SIZE_FLAGS[name.split("_")[0]])[int(block)] = width
    return args


def standard_widths(args):
    """The widths of a standard network of these arguments, without its classifier."""
    with as_user_error("--num-atoms: "):
        network = models.build(options.network_config(args, Signal(*args.input_shape), args.num_classes))
    return checked_widths(None, weight_layers(network, torch.rand(2, *args.input_shape)))


def sample_all(args, argv, folder, log, sampler, network_args, device):
    """All samples that are not there yet, each complete before the next; what a killed run left is kept."""
    source = digest([sampler.trained])
    rows = known_rows(args, folder, source)
    if rows is None:
        start_anew(args, argv, folder, log, sampler, source)
        rows = []
    done = {int(row["repeat"]) for row in rows}
    log.say(
        f"{folder.path}: rainbow networks of {args.experiment}, {args.method}, widths "
        f"{' '.join(map(str, sampler.widths))}, on {describe_device(device)}"
    )
    for repeat in range(args.num_repeats):
        if repeat in done:
            log.say(f"sample {repeat}: there already")
            continue
        log.status("running", repeat, args.num_repeats, *summary(rows))
        sample = sampler.sample(sample_seed(args.seed, repeat), partial(tell, log, sampler, repeat))
        acc1 = sample.accuracies[-1].acc1
        save(folder.path / f"checkpoint_repeat{repeat}.pt", checkpoint_of(sample.network, network_args, 0, acc1))
        rows += [row_of(repeat, accuracy) for accuracy in sample.accuracies]
        write_rows(folder, rows)
    rows = [row for row in rows if int(row["repeat"]) < args.num_repeats]
    write_json(folder.path / "args.json", description(args, argv, sampler, source))
    log.status("finished", args.num_repeats, args.num_repeats, *summary(rows))
    log.say(f"{len(final_accuracies(rows))} samples: top-1 {summary(rows)[0]:.2f} % on average")


def known_rows(args, folder, source):
    """The rows of the samples that are there, complete, from the same network with the same options; None for none.

    Raises UserError where samples of other options would be lost.
    """
    path = folder.path / "args.json"
    if args.overwrite or not path.exists():
        return None
    before = read_json(path)
    for dest, value in vars(args).items():
        if dest not in FREE and before.get("args", {}).get(dest) != value:
            raise UserError(
                f"{folder.path} holds samples with {dest} = {before.get('args', {}).get(dest)!r}, now "
                f"{value!r}: --overwrite samples anew, another --dir keeps both"
            )
    if before.get("source") != source:
        return None
    try:
        with open(folder.path / "accuracies.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return []
    return [row for row in rows if (folder.path / f"checkpoint_repeat{row['repeat']}.pt").exists()]


def start_anew(args, argv, folder, log, sampler, source):
    """Removes samples of before; their description goes first, so that nothing is taken for what it is not."""
    log.status("running", 0, args.num_repeats)
    (folder.path / "args.json").unlink(missing_ok=True)
    for path in [folder.path / "log.txt", folder.path / "accuracies.csv", *folder.path.glob("checkpoint_repeat*.pt")]:
        path.unlink(missing_ok=True)
    write_json(folder.path / "args.json", description(args, argv, sampler, source))


def description(args, argv, sampler, source):
    """What args.json holds: what is needed to repeat a sample, and a digest of the network it came from."""
    parameters = sum(p.numel() * (2 if p.is_complex() else 1) for p in sampler.trained.parameters())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "argv": argv,
        "args": vars(args),
        "versions": versions,
        "seed": args.seed,
        "source": source,
        "widths": sampler.widths,
        "parameters": {"total": parameters},
    }


def sample_seed(seed, repeat):
    """The seed of one of the samples."""
    return int(np.random.SeedSequence((seed, repeat)).generate_state(1)[0])


def tell(log, sampler, repeat, accuracy):
    """A line of progress."""
    layers = len(sampler.widths)
    what = "trained network" if accuracy.layer == 0 else f"layers 1..{accuracy.layer} of {layers}"
    log.say(f"sample {repeat}: {what}: top-1 {accuracy.acc1:.2f} %, top-5 {accuracy.acc5:.2f} %")


def row_of(repeat, accuracy):
    """A row of accuracies.csv."""
    return {"repeat": repeat, "layer": accuracy.layer, "acc1": f"{accuracy.acc1:.4f}", "acc5": f"{accuracy.acc5:.4f}"}


def write_rows(folder, rows):
    """Writes accuracies.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(folder.path / "accuracies.csv", lambda file: file.write(text.getvalue().encode()))


def final_accuracies(rows):
    """Top-1 accuracy of each sample with all layers sampled."""
    return list({row["repeat"]: float(row["acc1"]) for row in rows}.values())


def summary(rows):
    """Average and best top-1 accuracy of the samples, None for none."""
    final = final_accuracies(rows)
    return (sum(final) / len(final), max(final)) if final else (None, None)


def show_warning(message, category, filename, lineno, file=None, line=None):
    """A warning in one line."""
    print(f"resample.py: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    warnings.showwarning = show_warning
    run_main(main)
