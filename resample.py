"""Samples rainbow networks of a trained experiment: python resample.py --experiment NAME (--help lists the options).

Writes checkpoint_repeat{r}.pt, which `main_block.py --resume … --restart --freeze-P 1` trains the classifier of, and
accuracies.csv: the test accuracy after every layer (repeat, layers sampled, top-1, top-5 in percent).
"""

import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils import errors, machine

# isort: split
os.environ.update(machine.for_threads())  # torch must find them
if __name__ == "__main__":
    errors.end_at_interrupts()

import numpy as np
import torch
from tqdm import tqdm

import models
from models import rainbow_layers
from rainbow import RainbowError, weight_layers
from rainbow.alignment import MeanNetwork
from rainbow.moments import digest
from rainbow.sampling import RainbowSampler
from rainbow.widths import checked_widths
from utils.data.datasets import load_datasets
from utils.device import describe_device, pick_device
from utils.errors import UserError, as_user_error, did_you_mean, run_main
from utils.files import read_json
from utils.runs import options, samples, session
from utils.runs.checkpoints import checkpoint_of, load, save
from utils.runs.folder import RunFolder
from utils.runs.log import RunLog
from utils.runs.networks import load_network, network_config
from utils.runs.stop import StopRequest

TOLERANCE = 2.0  # percent, between machines and precisions


@as_user_error(kind=RainbowError)
def main(argv=None):
    """Samples as the command line says. Returns the exit status; raises RunError."""
    rainbow_layers.register()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options.parse_sampling(argv)
    with StopRequest():
        sample(args, argv)
    return 0


def sample(args, argv):
    """Samples in the folder --dir, which this process holds meanwhile."""
    device = pick_device(args.device)
    session.set_precision(device)
    experiment, folder = find_experiment(args), RunFolder(args.checkpoints, args.dir)
    folder.refuse_work_of_others(options.SAMPLING.program)
    trained = load_network(experiment, args.epoch, device)
    checkpoint = partial(checkpoint_of, args=resized_args(trained, args.num_atoms), data=trained, epoch=0)
    sampler = prepare(args, trained.network, load_data(args, trained, experiment), device)
    check_accuracy(args, experiment, sampler)
    about = {"source": digest([sampler.trained]), "widths": sampler.widths}
    with session.hold(folder, options.SAMPLING.program):
        rows = known_rows(folder, args, about["source"])
        log = RunLog(folder)
        with session.failures_noted(folder), as_user_error(kind=RainbowError):
            if rows is None:
                start_over(folder, log, args)
            session.describe(folder, argv, vars(args), sampler.trained, **about)
            widths = " ".join(map(str, sampler.widths))
            log.say(f"{folder.path}: rainbow networks of {args.experiment}, {args.method}, widths {widths}")
            log.say(f"on {describe_device(device)}")
            rows = sample_all(folder, log, args, sampler, rows or [], checkpoint)
            log.status("finished", args.num_repeats, args.num_repeats, *summary(rows))
            layers = f"layers 1..{samples.rainbow_layer(rows)} of {len(sampler.widths)}"
            log.say(f"{args.num_repeats} samples: {layers}: top-1 {summary(rows)[0]:.2f} % on average")


def find_experiment(args):
    """The run to sample from. Raises UserError if it does not exist, or is not finished and no epoch is chosen."""
    source = RunFolder(args.checkpoints, args.experiment)
    if options.TRAINING.program not in source.programs():
        root = Path(args.checkpoints)
        names = sorted(path.parent.relative_to(root).as_posix() for path in root.glob("**/args.json"))
        raise UserError(f"--experiment {args.experiment}: no such run in {root}{did_you_mean(args.experiment, names)}")
    status = source.status()
    if args.epoch is None and status.get("state") != "finished":
        kept = ", ".join(map(str, source.epochs())) or "none"
        raise UserError(
            f"--experiment {args.experiment}: not finished (epoch {status.get('epoch')} of {status.get('epochs')}, "
            f"{status.get('state', 'not begun')}); finish its training, or choose an epoch with --epoch (kept: {kept})"
        )
    return source


def load_data(args, trained, source):
    """The data that the experiment was trained on. Raises UserError if what is found now is other data."""
    places = {key: getattr(args, key) for key in ("data", "data_dir") if getattr(args, key) is not None}
    datasets = load_datasets(replace(trained.args, **places))
    if datasets.signal != trained.signal or datasets.num_classes != trained.num_classes:
        raise UserError(
            f"{source.path} was trained on {trained.signal} and {trained.num_classes} classes, but "
            f"{datasets.name} now has {datasets.signal} and {datasets.num_classes} classes: different data"
        )
    return datasets


def prepare(args, network, datasets, device):
    """The sampler of the trained network over its data."""
    sets = (datasets.train, datasets.val)
    train, test = (images.loader(args.batch_size, workers=args.workers, device=device) for images in sets)
    progress = partial(tqdm, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
    chosen = {"method": args.method, "widths": args.num_atoms, "align_on_test": args.align_test}
    return RainbowSampler(MeanNetwork.fit([network], train), train, test=test, progress=progress, **chosen)


def check_accuracy(args, source, sampler):
    """Raises UserError if the trained network is far from the accuracy of its own last validation."""
    known, found = source.status().get("acc1"), sampler.trained_accuracy.acc1
    if args.epoch is None and known is not None and abs(known - found) > TOLERANCE:
        accuracies = f"{known:.2f} %, now {found:.2f} %"
        raise UserError(f"{source.path}: accuracy differs from training time ({accuracies}): different data?")


def resized_args(trained, widths):
    """The arguments with which `main_block.py` builds a network of these widths. Raises UserError if none are."""
    args, layers = trained.args, layers_of(trained.network, trained.signal)
    own, widths = checked_widths(None, layers), checked_widths(widths, layers)
    if widths == own:
        return args
    if options.is_standard(args):
        args = replace(args, standard_width_scaling=args.standard_width_scaling * widths[0] / own[0])
        with as_user_error("--num-atoms: "):
            network = models.build(network_config(args, trained.signal, trained.num_classes))
        found = checked_widths(None, layers_of(network, trained.signal))
        if found != widths:
            raise UserError(
                f"--num-atoms: a {args.arch} has int(s·w) channels in every layer with one s; "
                f"s = {args.standard_width_scaling:g} gives {' '.join(map(str, found))}"
            )
        return args
    sizes = {}
    for layer, width in zip(layers, widths):
        _, block, _, name = layer.name.split(".")
        field = options.size_option(name.split("_")[0]).field
        sizes.setdefault(field, list(getattr(args, field)))[int(block)] = width
    return replace(args, **sizes)


def layers_of(network, signal):
    """The weight layers of a network for images of type `signal`."""
    return weight_layers(network, torch.rand(2, signal.channels, signal.height, signal.width))


def known_rows(folder, args, source):
    """The rows of the complete samples in the folder, if of the same network and options; None if there are none.

    Raises UserError if samples of other options would be lost.
    """
    path = folder.path / "args.json"
    if args.overwrite or not path.exists():
        return None
    before, command = read_json(path), options.SAMPLING
    session.refuse_changes(folder, "samples", command, command.restore(before.get("args"), path), args)
    if before.get("source") != source:
        return None
    rows = samples.read_rows(folder.path)
    whole = {each for each in {row["repeat"] for row in rows} if is_whole(folder.file(f"checkpoint_repeat{each}"))}
    return [row for row in rows if row["repeat"] in whole]


def is_whole(path):
    """Whether a file is an undamaged checkpoint."""
    try:
        return bool(load(path))
    except UserError:
        return False


def start_over(folder, log, args):
    """Removes older samples; their description goes first, so that nothing is taken for what it is not."""
    log.status("running", 0, args.num_repeats)
    folder.remove("args.json", "log.txt", samples.NAME, "checkpoint_repeat*.pt")


def sample_all(folder, log, args, sampler, rows, checkpoint):
    """Samples what `rows` lack, each sample complete before the next. Returns the rows of all samples asked for.

    checkpoint: makes one of a network and its best accuracy.
    """
    done = {int(row["repeat"]) for row in rows}

    def tell(accuracy):
        layers = f"layers 1..{accuracy.layer} of {len(sampler.widths)}" if accuracy.layer else "trained network"
        log.say(f"sample {repeat}: {layers}: top-1 {accuracy.acc1:.2f} %, top-5 {accuracy.acc5:.2f} %")

    for repeat in range(args.num_repeats):
        if repeat in done:
            log.say(f"sample {repeat}: exists already")
            continue
        log.status("running", repeat, args.num_repeats, *summary(rows))
        seed = int(np.random.SeedSequence((args.seed, repeat)).generate_state(1)[0])
        sample = sampler.sample(seed, tell)
        acc1 = sample.accuracies[-1].acc1
        save(folder.path / f"checkpoint_repeat{repeat}.pt", checkpoint(sample.network, best_acc1=acc1))
        rows += [samples.row_of(repeat, accuracy) for accuracy in sample.accuracies]
        samples.write_rows(folder.path, rows)
    return [row for row in rows if int(row["repeat"]) < args.num_repeats]


def summary(rows):
    """Average and best top-1 accuracy of the paper's rainbow networks among the samples, None for none."""
    found = samples.rainbow_accuracies(rows)
    return (sum(found) / len(found), max(found)) if found else (None, None)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"resample.py: warning: {message}\n"
    run_main(main)
