"""Every experiment of the paper: list, print, run, follow, submit.

python run_exps.py --print                     the commands of all of them
python run_exps.py --scale laptop              train the whole paper in small, on this machine
python run_exps.py --figure 3 --status         what is done, running, failed or missing for a figure
python run_exps.py --submit slurm --gpus 1     hand them to a cluster
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from utils.errors import UserError, did_you_mean, run_main
from utils.experiments import cluster, processes, runner
from utils.experiments import registry as experiments
from utils.experiments import status as progress

FOLDER = Path(__file__).resolve().parent


def parser():
    """The command line."""
    parser = argparse.ArgumentParser(description="Every experiment of the paper: list, print, run, follow, submit.")
    which = parser.add_argument_group("which (all conditions together; what they need is run too)")
    which.add_argument("--scale", default="paper", help="paper (default) or laptop: all of it in small, for two cores")
    which.add_argument("--only", nargs="+", metavar="GROUP", help="experiments of these groups")
    which.add_argument("--figure", nargs="+", type=int, metavar="N", help="experiments of these figures of the paper")
    which.add_argument("--match", metavar="REGEX", help="experiments whose name matches somewhere")
    which.add_argument("--name", nargs="+", metavar="NAME", help="experiments of these names")
    what = parser.add_argument_group("what to do with them (default: run them)").add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print '[ i/n] name:<tab>command' and end")
    what.add_argument("--status", action="store_true", help="a table of what is done, running, failed, missing")
    what.add_argument("--submit", choices=("slurm", "local"), help="hand them to SLURM, or to submitit on this machine")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes at a time, the cores or GPUs shared out between "
        "them (default: laptop, one per core; paper, one per GPU or one)",
    )
    how.add_argument(
        "--start",
        choices=("warm", "fresh"),
        help="fork a process that has its imports done (default at "
        "the laptop scale on a CPU under Linux), or start an interpreter anew for each",
    )
    how.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where runs are kept")
    how.add_argument(
        "--data",
        default=os.environ.get("IMAGENET_DIR"),
        metavar="DIR",
        help="ImageNet's folder (default: IMAGENET_DIR)",
    )
    how.add_argument("--data-dir", metavar="DIR", help="where downloaded data sets live")
    how.add_argument("--device", help="passed on to every run")
    trial = parser.add_argument_group("a trial (other training flags, in folders named trial-…)")
    for flag in experiments.TRIAL_FLAGS:
        trial.add_argument(flag, metavar="X", help=f"passed on to every training in place of its own {flag}")
    cluster.add_arguments(parser.add_argument_group("clusters (--submit)"))
    return parser


def select(args):
    """The experiments that the command line asks for. Raises UserError where it names what does not exist."""
    if args.scale not in experiments.SCALES:
        raise UserError(f"--scale {args.scale}: no such scale{did_you_mean(args.scale, experiments.SCALES)}")
    chosen = all_experiments(args)
    names = {experiment.name for experiment in chosen}
    for group in args.only or ():
        if group not in experiments.groups(args.scale):
            raise UserError(f"--only {group}: no such group{did_you_mean(group, experiments.groups(args.scale))}")
    for figure in args.figure or ():
        if figure not in experiments.figures(args.scale):
            raise UserError(f"--figure {figure}: no such figure; known: {experiments.figures(args.scale)}")
    for name in args.name or ():
        if name not in names:
            raise UserError(f"--name {name}: no such experiment{did_you_mean(name, names)}")
    try:
        pattern = re.compile(args.match or "")
    except re.error as error:
        raise UserError(f"--match {args.match}: not a regular expression ({error})") from error
    chosen = [
        experiment
        for experiment in chosen
        if (not args.only or experiment.group in args.only)
        and (not args.figure or set(args.figure) & set(experiment.figures))
        and (not args.name or experiment.name in args.name)
        and pattern.search(experiment.name)
    ]
    if not chosen:
        raise UserError("no experiment is all of this at once; --print without conditions lists them")
    return chosen


def all_experiments(args):
    """Every experiment of the scale, as a trial where flags are overridden, as one of many inside a SLURM array."""
    listed = list(experiments.experiments(args.scale))
    values = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in experiments.TRIAL_FLAGS}
    overrides = {flag: value for flag, value in values.items() if value is not None}
    if not overrides.get("--epochs", "1").isdigit():
        raise UserError(f"--epochs {args.epochs}: should be a whole number")
    if overrides:
        listed = [experiments.trial(experiment, overrides) for experiment in listed]
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if task.isdigit():
        listed = [experiments.with_init(experiment, int(task)) for experiment in listed]
    return listed


def with_needs(chosen, listed):
    """The chosen experiments and all that they need, in order."""
    known, wanted = {experiment.name: experiment for experiment in listed}, {}

    def add(experiment):
        for need in experiment.needs:
            add(known[need])
        wanted[experiment.name] = experiment

    for experiment in chosen:
        add(experiment)
    return [experiment for experiment in listed if experiment.name in wanted]


def extra_flags(args):
    """Flags for every command: where its folder and data are, and on what it runs."""
    flags = [] if args.checkpoints == "checkpoints" else ["--checkpoints", args.checkpoints]
    flags += ["--data-dir", args.data_dir] if args.data_dir else []
    return tuple(flags + (["--device", args.device] if args.device else []))


def print_commands(chosen, args):
    width = len(str(len(chosen)))
    for i, experiment in enumerate(chosen, 1):
        command = experiment.command(data=args.data, extra=extra_flags(args))
        print(f"[{i:>{width}}/{len(chosen)}] {experiment.name}:\t{experiments.printed(command)}")


def gpus():
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(filter(None, visible.split(",")))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(i) for i, _ in enumerate(re.findall(r"^GPU ", listed.stdout, re.MULTILINE)))


def run(chosen, args):
    """Runs the experiments on this machine. Returns the exit status."""
    devices = gpus() if args.device in (None, "auto", "cuda") else ()
    jobs = args.jobs or (runner.cores() if args.scale == "laptop" and not devices else max(1, len(devices)))
    small = args.scale == "laptop" and not devices and sys.platform == "linux"
    start = args.start or ("warm" if small else "fresh")
    if start == "warm" and not hasattr(os, "fork"):
        raise UserError("--start warm: this system cannot fork; --start fresh")
    starts = {"warm": processes.start_warm, "fresh": processes.start_fresh}
    settings = runner.Settings(
        root=Path(args.checkpoints),
        folder=FOLDER,
        start=starts[start],
        jobs=jobs,
        data=args.data,
        extra=extra_flags(args),
        gpus=devices,
    )
    work = runner.Runner(chosen, settings)
    if start == "warm" and work.settle():
        os.environ["OMP_NUM_THREADS"] = runner.threads_per_job(jobs)
        processes.warm_up()
    return work.run()


def main(argv=None):
    args = parser().parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: should be at least 1")
    chosen = select(args)
    if args.print:
        print_commands(chosen, args)
        return 0
    if args.status:
        print("\n".join(progress.status_table(args.checkpoints, chosen)))
        return 0
    needed = with_needs(chosen, all_experiments(args))
    if args.submit:
        return cluster.submit(needed, args, FOLDER)
    return run(needed, args)


if __name__ == "__main__":
    run_main(main)
