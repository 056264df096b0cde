"""Trains one network of the paper: python main_block.py --digits -a 'Fw Std Pr N' … (--help lists the options)."""

import os
import platform
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from importlib import metadata

import torch

import models
from utils.data.datasets import load_datasets
from utils.device import describe_device
from utils.errors import StoppedError, UserError, as_user_error, run_main
from utils.files import write_json
from utils.lock import Lock
from utils.runs import options
from utils.runs import ranks as distributed
from utils.runs.checkpoints import RunFolder, find_checkpoint, load, load_weights
from utils.runs.log import RunLog
from utils.runs.training import Training

# Options that say where and how far a run goes; a run that goes on may change them, but no others.
FREE = frozenset(
    "dir checkpoints overwrite evaluate epochs print_freq tensorboard data data_dir bad_images workers "
    "device amp compile tf32".split()
)


def main(argv=None):
    """Trains or evaluates as the command line says. Returns the exit status; raises RunError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options.parse(argv)
    world = distributed.join(args.device)
    try:
        set_precision(args, world.device)
        datasets = load_datasets(args)
        signal = datasets.signal
        args.input_shape, args.num_classes = [signal.channels, signal.height, signal.width], datasets.num_classes
        network = build(args, signal, world)
        if args.evaluate:
            return evaluate(network, datasets, args, world)
        return train(network, datasets, args, world, argv)
    finally:
        world.leave()


def set_precision(args, device):
    """TensorFloat-32 as asked for, wherever products could use it."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = args.tf32
    elif args.tf32:
        raise UserError(f"--tf32 is of CUDA GPUs; this runs on {device}")


def build(args, signal, world):
    """The network, with weights drawn from the seed, on its device."""
    torch.manual_seed(args.seed)
    config = options.network_config(args, signal, args.num_classes)
    with as_user_error():
        network = models.build(config)
    if not world.is_main:
        torch.manual_seed(args.seed + world.rank)
    network = network.to(world.device)
    if isinstance(args.arch, str):
        network = network.to(memory_format=torch.channels_last)
    return network


def evaluate(network, datasets, args, world):
    """Prints loss and accuracy on the validation set of --resume, or of the run --dir."""
    if args.resume:
        source = find_checkpoint(args.resume, args.checkpoints)
        checkpoint = load(source)
    else:
        folder = RunFolder(args.checkpoints, args.dir)
        source, checkpoint = folder.path, folder.checkpoint()
    load_weights(network, checkpoint["state_dict"], source)
    score = Training(network, datasets, args, world, RunLog(silent=True)).validate()
    if world.is_main:
        print(
            f"{source}, after epoch {checkpoint.get('epoch')}: loss {score.loss:.4f}, top-1 {score.acc1:.2f} %, "
            f"top-5 {score.acc5:.2f} % of {score.images} images"
        )
    return 0


def train(network, datasets, args, world, argv):
    """Trains in the run's folder, which this process holds meanwhile."""
    folder = RunFolder(args.checkpoints, world.from_main(args.dir or default_name(args)))
    args.dir = folder.name
    goes_on = world.from_main(world.is_main and is_continued(folder, args))
    start = None if goes_on or not args.resume else starting_point(network, args, folder)
    with hold(folder, args, goes_on) if world.is_main else nullcontext():
        world.from_main(None)  # the folder is ready
        log = RunLog(folder if world.is_main else None, not world.is_main, args.tensorboard)
        try:
            training = Training(network, datasets, args, world, log)
            if goes_on:
                start = folder.checkpoint()
                load_weights(network, start["state_dict"], folder.path)
            if start is not None and not args.restart or goes_on:
                training.restore(start)
            if world.is_main:
                write_json(folder.path / "args.json", description(network, args, argv))
            introduce(training, log, args.resume if start is not None and not goes_on else None)
            training.run()
        except StoppedError:
            raise
        except Exception as error:
            log.failed(f"{type(error).__name__}: {error}")
            raise
    return 0


def default_name(args):
    """A name for a run that was given none: network, data and time."""
    arch = re.sub(r"\W+", "-", options.arch_name(args))
    return f"{args.dataset}-{arch}-{time.strftime('%Y%m%d-%H%M%S')}"


def is_continued(folder, args):
    """Whether the folder holds a run of the same arguments, which then goes on.

    Raises UserError where it holds another run, which is not to be lost.
    """
    if args.overwrite or not folder.is_started():
        return False
    if args.resume and os.path.realpath(args.resume) == os.path.realpath(folder.file("last")):
        args.resume, args.restart = folder.args().resume, folder.args().restart
    before = vars(folder.args())
    for dest, value in vars(args).items():
        if dest not in FREE and before.get(dest) != value:
            raise UserError(
                f"{folder.path} holds a run with {dest} = {before.get(dest)!r}, now {value!r}: "
                "--overwrite starts it anew, another --dir keeps both"
            )
    return True


def starting_point(network, args, folder):
    """The checkpoint --resume, its weights set. Raises UserError."""
    source = find_checkpoint(args.resume, args.checkpoints)
    if args.overwrite and folder.path.resolve() in source.resolve().parents:
        raise UserError(f"--resume {source}: --overwrite would remove it; give another --dir")
    checkpoint = load(source)
    load_weights(network, checkpoint["state_dict"], source)
    if not args.restart and int(checkpoint.get("epoch", 0)) >= args.epochs:
        raise UserError(
            f"{source} is after epoch {checkpoint['epoch']}: nothing is left of --epochs {args.epochs} "
            "(--restart takes the weights only)"
        )
    return checkpoint


@contextmanager
def hold(folder, args, goes_on):
    """The run's folder for this process alone, ready for a run that goes on or begins."""
    folder.create()
    with Lock(folder.path / "lock"):
        folder.clean()
        if goes_on:
            folder.recover()
        elif args.overwrite:
            folder.clear()
        elif folder.is_started():
            raise UserError(f"{folder.path}: another process has just trained there; the same command goes on with it")
        yield


def description(network, args, argv):
    """What args.json holds: everything that is needed to repeat and understand a run."""
    total, learned = count_parameters(network)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions.update({package: metadata.version(package) for package in ("torchvision", "numpy")})
    return {
        "argv": argv,
        "args": vars(args),
        "versions": versions,
        "seed": args.seed,
        "parameters": {"total": total, "learned": learned},
    }


def count_parameters(network):
    """How many numbers the parameters hold, and how many of them are learned; a complex one holds two."""
    sizes = [(p.numel() * (2 if p.is_complex() else 1), p.requires_grad) for p in network.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_learned in sizes if is_learned)


def introduce(training, log, resumed):
    """Says what will run, on what, and where."""
    args, world, datasets = training.args, training.world, training.datasets
    total, learned = count_parameters(training.network)
    precision = ["bfloat16 (autocast)" if args.amp else "float32"] + ["TF32"] * args.tf32 + ["compiled"] * args.compile
    log.say(f"{log.where()}: {options.arch_name(args)}, {total:,} parameters, {learned:,} of them learned")
    log.say(
        f"{datasets.name}: {len(datasets.train)} images for training, {len(datasets.val)} for validation, "
        f"{datasets.num_classes} classes, {training.steps} steps of {args.batch_size} images an epoch"
    )
    log.say(f"on {describe_device(world.device)}, {', '.join(precision)}, torch {torch.__version__}")
    if world.size > 1:
        log.say(
            f"{world.size} processes share each batch of {args.batch_size} images; the learning rate stays "
            f"{args.lr:g}, it is not scaled with the number of processes"
        )
    if training.left_out:
        log.say(f"{training.left_out} images of each epoch are left out: they are fewer than the processes")
    if resumed:
        log.say(f"weights from {resumed}" + ("" if args.restart else f", going on after epoch {training.epoch}"))
    elif training.epoch >= args.epochs:
        log.say(f"finished already: all {training.epoch} epochs are done")
    elif training.history:
        log.say(f"going on after epoch {training.epoch}" + f", step {training.step}" * (training.step > 0))


if __name__ == "__main__":
    run_main(main)
