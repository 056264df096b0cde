"""Every experiment of the paper: list, print, run, follow, submit (--help lists the options)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from utils import machine
from utils.errors import UserError, did_you_mean, run_main
from utils.experiments import cluster, processes, registry, runner, status
from utils.runs import options
from utils.runs import values as to
from utils.runs.command import Parser

FOLDER = Path(__file__).resolve().parent
EXAMPLES = (
    "python run_exps.py --print                     # the commands of all of them",
    "python run_exps.py --scale laptop              # train the whole paper at small scale, on this machine",
    "python run_exps.py --figure 3 --status         # what is done, running, failed or missing for a figure",
    "python run_exps.py --submit slurm --gpus 1     # submit them to a cluster",
)


def parser():
    """The command line."""
    parser = Parser("run_exps.py", "Every experiment of the paper: list, print, run, follow, submit.", EXAMPLES)
    which = parser.add_argument_group("which (all conditions must hold; what the chosen ones need is run too)")
    which.add_argument("--scale", default="paper", help=f"one of {', '.join(registry.SCALES)} (default: paper)")
    which.add_argument("--only", nargs="+", metavar="GROUP", help="experiments of these groups")
    which.add_argument("--figure", nargs="+", type=int, metavar="N", help="experiments of these figures of the paper")
    which.add_argument("--match", metavar="REGEX", help="experiments whose name matches somewhere")
    which.add_argument("--name", nargs="+", metavar="NAME", help="experiments of these names")
    group = parser.add_argument_group("what to do with them (default: run them)")
    group.add_argument("--json", action="store_true", help="with --status: a JSON list with an object per experiment")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print '[ i/n] name:<tab>command', needs included, and exit")
    what.add_argument("--status", action="store_true", help="print what is done, running, failed, missing, and exit")
    what.add_argument("--submit", choices=("slurm", "local"), help="submit them to SLURM, or in the same way here")
    _add_running_options(parser.add_argument_group("how"))
    trial = parser.add_argument_group("a trial (other training flags, in folders named trial-…)")
    for flag in registry.TRIAL_FLAGS:
        help = f"passed on to every training in place of its own {flag}"
        trial.add_argument(flag, metavar="X", type=options.TRAINING.checked(flag), help=help)
    cluster.add_arguments(parser.add_argument_group("clusters (--submit)"))
    return parser


def _add_running_options(how):
    jobs = "processes at a time, which share the cores or GPUs (default: one per core at small scales; one per GPU)"
    start = "warm: fork a process that has imported torch (default at small scales without GPU on Linux), or fresh"
    data = os.environ.get("IMAGENET_DIR")
    how.add_argument("--jobs", type=to.positive_int, metavar="N", help=jobs)
    how.add_argument("--start", choices=("warm", "fresh"), help=start)
    how.add_argument(
        "--checkpoints", type=to.path, default="checkpoints", metavar="DIR", help="folder of the runs' folders"
    )
    how.add_argument(
        "--data", type=to.path, default=data, metavar="DIR", help="ImageNet's folder (default: IMAGENET_DIR)"
    )
    how.add_argument("--data-dir", type=to.path, metavar="DIR", help="folder of downloaded data sets")
    how.add_argument("--device", help="passed on to every run")


def select(args):
    """The experiments that the command line asks for, under their names here or in the registry.

    Raises UserError if it names what does not exist.
    """
    listed = all_experiments(args)
    names = [(here.name, there.name) for here, there in zip(listed, registry.experiments(args.scale))]
    every = list(dict.fromkeys(name for pair in names for name in pair))
    known = {"only": registry.groups(args.scale), "figure": registry.figures(args.scale), "name": every}
    for flag, values in known.items():
        for value in getattr(args, flag) or ():
            if value not in values:
                what = {"only": "group", "name": "experiment"}.get(flag, flag)
                raise UserError(f"--{flag} {value}: no such {what}{did_you_mean(value, values)}")
    try:
        pattern = re.compile(args.match or "")
    except re.error as error:
        raise UserError(f"--match {args.match}: not a regular expression ({error})") from error
    chosen = [
        experiment
        for experiment, own in zip(listed, names)
        if (not args.only or experiment.group in args.only)
        and (not args.figure or set(args.figure) & set(experiment.figures))
        and (not args.name or set(args.name) & set(own))
        and any(map(pattern.search, own))
    ]
    if not chosen:
        raise UserError("no experiment meets all of these conditions; --print without conditions lists them")
    return chosen


def all_experiments(args):
    """Every experiment of the scale, as a trial if flags are overridden, as one of many inside a SLURM array."""
    if args.scale not in registry.SCALES:
        raise UserError(f"--scale {args.scale}: no such scale{did_you_mean(args.scale, registry.SCALES)}")
    listed = registry.experiments(args.scale)
    values = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in registry.TRIAL_FLAGS}
    overrides = {flag: value for flag, value in values.items() if value is not None}
    if overrides:
        listed = [registry.trial(experiment, overrides) for experiment in listed]
    if (task := options.array_task()) is not None:
        listed = [registry.with_init(experiment, task) for experiment in listed]
    return listed


def with_needs(chosen, listed):
    """The chosen experiments and all that they need, in order."""
    wanted = {experiment.name for experiment in chosen}
    for experiment in reversed(listed):  # each is listed after those it needs
        if experiment.name in wanted:
            wanted.update(experiment.needs)
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
        print(f"[{i:>{width}}/{len(chosen)}] {experiment.name}:\t{shlex.join(command)}")


def gpus():
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return machine.gpus(visible)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(i) for i, _ in enumerate(re.findall(r"^GPU ", listed.stdout, re.MULTILINE)))


def run(chosen, args):
    """Runs the experiments on this machine. Returns the exit status."""
    devices = gpus() if args.device in (None, "auto", "cuda") else ()
    is_small = args.scale in registry.SMALL and not devices
    is_warm = args.start == "warm" or not args.start and is_small and sys.platform == "linux"
    jobs = args.jobs or (machine.cores() if is_small else max(1, len(devices)))
    os.environ["OMP_NUM_THREADS"] = runner.threads_per_job(jobs)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))

    def start(experiment, log, environment):
        command = experiment.command(sys.executable, args.data, extra_flags(args))
        command[1] = str(FOLDER / command[1])
        return (processes.start_warm if is_warm else processes.start_fresh)(command, log, environment)

    return runner.Runner(chosen, Path(args.checkpoints), start, jobs, devices, bool(args.data)).run()


def main(argv=None):
    args = parser().parse_args(argv)
    if args.json and not args.status:
        raise UserError("--json is the form of --status, which is missing")
    chosen = select(args)
    needed = with_needs(chosen, all_experiments(args))
    if args.print:
        print_commands(needed, args)
        return 0
    if args.status:
        if args.json:
            print(json.dumps(status.status_records(args.checkpoints, chosen), indent=1))
        else:
            print("\n".join(status.status_table(args.checkpoints, chosen)))
        return 0
    if args.submit:
        return cluster.submit(needed, args, FOLDER)
    return run(needed, args)


if __name__ == "__main__":
    run_main(main)
