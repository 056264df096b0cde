"""Trains one network of the paper: python main_block.py --digits -a 'Fw Std Pr N' … (--help lists the options)."""

import os
import sys
from contextlib import ExitStack
from dataclasses import replace

from utils import errors, machine

# isort: split
os.environ.update(machine.for_threads())  # torch must find them
if __name__ == "__main__":
    errors.end_at_interrupts()

import torch

import models
from utils.data.datasets import load_datasets
from utils.device import describe_device
from utils.errors import UserError, as_user_error, cause_of, run_main
from utils.runs import options, ranks, session
from utils.runs.checkpoints import load, load_weights, stored_args
from utils.runs.folder import RunFolder, find_checkpoint
from utils.runs.log import RunLog
from utils.runs.networks import network_config
from utils.runs.stop import StopRequest
from utils.runs.training import Training


def main(argv=None):
    """Trains or evaluates as the command line says. Returns the exit status; raises RunError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = as_started(options.parse(argv), argv)
    world = ranks.join(args.device)
    try:
        with StopRequest() as stop:
            session.set_precision(world.device, args.tf32)
            datasets = load_datasets(args)
            network = build(args, datasets, world)
            if args.evaluate:
                evaluate(network, datasets, args, world, stop)
            else:
                train(network, datasets, args, world, stop, argv)
            return 0
    finally:
        world.leave()


def as_started(args, argv):
    """The arguments, read as they were when the same words started the run in their folder: by an older version."""
    if not args.dir or args.evaluate or args.overwrite:
        return args
    folder = RunFolder(args.checkpoints, args.dir)
    if not folder.is_started() or folder.description().get("argv") != argv:
        return args
    free = [option.field for option in options.TRAINING.options if option.free]
    return replace(folder.args(), **{field: getattr(args, field) for field in free})


def build(args, data, world):
    """The network for this data, with weights drawn from the seed, on its device."""
    torch.manual_seed(args.seed)
    config = network_config(args, data.signal, data.num_classes)
    try:
        with as_user_error():
            network = models.build(config)
    except (OverflowError, RuntimeError, MemoryError) as error:
        raise UserError(f"a network too large for this machine ({cause_of(error)})") from error
    if not world.is_main:
        torch.manual_seed(args.seed + world.rank)
    network = network.to(world.device)
    channels_last = options.is_standard(args) and world.device.type == "cuda"
    return network.to(memory_format=torch.channels_last) if channels_last else network


def evaluate(network, datasets, args, world, stop):
    """Prints loss and accuracy on the validation set of --resume, or of the run --dir."""
    if args.resume:
        source = find_checkpoint(args.resume, args.checkpoints)
        checkpoint = load(source)
    else:
        folder = RunFolder(args.checkpoints, args.dir)
        source, checkpoint = folder.path, folder.checkpoint()
    load_weights(network, checkpoint["state_dict"], source, args.loose_resume)
    score = Training(network, datasets, args, world, RunLog(silent=True), stop).validate()
    if world.is_main:
        accuracies = f"top-1 {score.acc1:.2f} %, top-5 {score.acc5:.2f} % of {score.images} images"
        print(f"{source}, after epoch {checkpoint.get('epoch')}: loss {score.loss:.4f}, {accuracies}")


def train(network, datasets, args, world, stop, argv):
    """Trains in the run's folder, which the main process holds meanwhile."""
    args = replace(args, dir=world.from_main(lambda: args.dir or options.made_up_name(args)))
    folder = RunFolder(args.checkpoints, args.dir)
    origin = world.from_main(lambda: origin_of_run(folder, args))
    if origin:
        args = replace(args, resume=origin[0], restart=origin[1])
    start = starting_point(network, args, folder) if args.resume and not origin else None
    with ExitStack() as held:
        last = world.from_main(lambda: take_over(folder, args, origin, held))
        log = RunLog(folder if world.is_main else None, not world.is_main, args.tensorboard)
        training, notes = Training(network, datasets, args, world, log, stop), []
        training.state.check_batches()
        if origin:
            load_weights(network, last["state_dict"], folder.path)
            notes = training.state.restore(last, folder.path, own=True)
        elif start and not args.restart:
            notes = training.state.restore(start, args.resume, own=False)
        with session.failures_noted(folder):
            if world.is_main:
                if args.overwrite:
                    folder.clear()
                session.describe(folder, argv, stored_args(args, datasets), network)
                introduce(training, start, notes)
            training.run()


def origin_of_run(folder, args):
    """Whether the run in the folder is the one that these arguments define, which is then continued.

    Returns what it was started with, (--resume, --restart), or None for a new run. Raises UserError if the folder
    holds another run, which must not be lost.
    """
    folder.refuse_work_of_others(options.TRAINING.program)
    if args.overwrite or not folder.is_started():
        return None
    before = folder.args()
    if args.resume and os.path.realpath(args.resume) == os.path.realpath(folder.file("last")):
        args = replace(args, resume=before.resume, restart=before.restart)
    session.refuse_changes(folder, "a run", options.TRAINING, before, args)
    return before.resume, before.restart


def starting_point(network, args, folder):
    """The checkpoint --resume, its weights set. Raises UserError."""
    source = find_checkpoint(args.resume, args.checkpoints)
    if args.overwrite and folder.path.resolve() in source.resolve().parents:
        raise UserError(f"--resume {source}: --overwrite would remove it; give another --dir")
    checkpoint = load(source)
    left_out = load_weights(network, checkpoint["state_dict"], source, args.loose_resume)
    if left_out:  # the state of its optimiser does not fit either
        checkpoint = {**checkpoint, "left_out": left_out}
        checkpoint.pop("tally", None)
    epoch = checkpoint.get("epoch", 0)
    if not args.restart and isinstance(epoch, int) and epoch >= args.epochs:
        left = f"nothing is left of --epochs {args.epochs} (--restart takes only the weights)"
        raise UserError(f"{source} is after epoch {epoch}: {left}")
    return checkpoint


def take_over(folder, args, origin, held):
    """Holds the folder for as long as `held`; returns the last checkpoint of a run that is continued, else None.

    Raises UserError if the folder's run has changed since `origin` was read.
    """
    held.enter_context(session.hold(folder, options.TRAINING.program))
    if origin_of_run(folder, args) != origin:
        raise UserError(f"{folder.path}: another process has just trained there; rerun the same command to continue it")
    return folder.checkpoint(repair=True) if origin else None


def introduce(training, start, notes):
    """Says what will run, on what, and where. `start`: the checkpoint that a new run starts from, or None; `notes`:
    what in a checkpoint is not as it was."""
    args, world, datasets = training.args, training.world, training.datasets
    state, say = training.state, training.log.say
    total, learned = session.count_parameters(training.network)
    precision = ["bfloat16 (autocast)" if args.amp else "float32"]
    if world.device.type == "cuda":
        precision.append("TF32" if args.tf32 else "TF32 in convolutions")
    if args.compile and options.is_standard(args):
        precision.append("compiled")
    say(f"{training.log.folder.path}: {options.arch_name(args)}, {total:,} parameters, {learned:,} of them learned")
    images = f"{len(datasets.train)} images for training, {len(datasets.val)} for validation"
    steps = f"{state.steps} steps of {args.batch_size} images an epoch"
    say(f"{datasets.name}: {images}, {datasets.num_classes} classes, {steps}")
    say(f"on {describe_device(world.device)}, {', '.join(precision)}, torch {torch.__version__}")
    if world.size > 1:
        rate = f"the learning rate stays {args.lr:g}, it is not scaled with the number of processes"
        say(f"{world.size} processes share each batch of {args.batch_size} images; {rate}")
    if state.left_out:
        why = "they are fewer than the processes" if world.size > 1 else "batch norm needs two"
        say(f"{state.left_out} images of each epoch are left out: {why}")
    if start:
        say(f"weights from {args.resume}" + ("" if args.restart else f", resumed after epoch {state.epoch}"))
        if "left_out" in start:
            say(f"what did not fit is left out: {'; '.join(start['left_out'][:5])} ({len(start['left_out'])} in all)")
    elif state.history.rows and state.epoch >= args.epochs:
        say(f"already finished: all {state.epoch} epochs are done")
    elif state.history.rows:
        say(f"resumed after epoch {state.epoch}" + f", step {state.step}" * (state.step > 0))
    for note in notes:
        say(f"WARNING: {note}")


if __name__ == "__main__":
    run_main(main)
