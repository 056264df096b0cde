"""Handing experiments to a cluster through submitit (an optional dependency): SLURM, or the same path on this machine.

Every job is `run_exps.py --name …` on its experiments, so that a job that was requeued skips what is finished and
goes on with what was started. What an experiment needs becomes a dependency of its job.
"""

import dataclasses
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from utils.errors import StoppedError, UserError
from utils.experiments.processes import start_fresh
from utils.experiments.registry import TRIAL_FLAGS
from utils.experiments.runner import in_order
from utils.experiments.status import read_state

PATIENCE = 60
REQUEUES = 1000


def add_arguments(group):
    """The flags of --submit."""
    group.add_argument("--partition", metavar="NAME", help="SLURM's partition")
    group.add_argument("--gpus", type=int, default=None, metavar="N", help="GPUs per job (default: none asked for)")
    group.add_argument(
        "--time",
        default="24:00:00",
        metavar="H:M:S",
        help="time limit of a job (default 24:00:00); a job that meets it is requeued and goes on",
    )
    group.add_argument(
        "--pack", type=int, default=1, metavar="N", help="experiments per job (default 1), --jobs of them at a time"
    )


def minutes(text):
    """A time limit in minutes: H:M:S, H:M, or minutes. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+)(?::(\d+))?", text)
    if not match:
        raise UserError(f"--time {text}: should be H:M:S or a number of minutes")
    days, hours, first, last = match.groups()
    if hours is None and last is None and days is None:
        return int(first)
    if hours is None:
        hours, first, last = first, last or 0, 0
    return int(days or 0) * 1440 + int(hours) * 60 + int(first) + (int(last or 0) > 0)


class Job:
    """What runs on a node: the runner on some experiments. submitit pickles it, calls it, and after SLURM's warning
    asks it for a `checkpoint`: it stops the runner, whose processes save their state, and hands itself in again."""

    def __init__(self, command):
        self.command, self._process = command, None

    def __call__(self):
        environment = {key: value for key, value in os.environ.items() if key != "SLURM_ARRAY_TASK_ID"}
        self._process = start_fresh(self.command, sys.stdout, environment)
        try:
            while (status := self._process.poll()) is None:
                time.sleep(0.1)
        finally:
            self._process.send(signal.SIGTERM)
        if status:
            raise RuntimeError(f"exit status {status}")

    def checkpoint(self):
        """Stops the runner. Returns what submitit puts into the queue again."""
        import submitit

        self._process.send(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(Job(self.command))


@dataclasses.dataclass
class Unit:
    """Experiments that share a job, and the job once it is submitted."""

    experiments: list
    job: object = None

    @property
    def needs(self):
        return {need for experiment in self.experiments for need in experiment.needs}

    @property
    def label(self):
        more = len(self.experiments) - 1
        return self.experiments[0].name + (f" and {more} more" if more else "")


def units(experiments, pack):
    """Packs of at most `pack` experiments, none of which needs another of its own pack."""
    depth, levels = {}, {}
    for experiment in in_order(experiments):
        depth[experiment.name] = max((depth.get(need, -1) for need in experiment.needs), default=-1) + 1
        levels.setdefault(depth[experiment.name], []).append(experiment)
    return [Unit(level[i : i + pack]) for _, level in sorted(levels.items()) for i in range(0, len(level), pack)]


def submit(experiments, args, folder):
    """Submits what is neither finished nor at work. Returns the exit status.

    SLURM: returns when all jobs are in the queue. Local: waits for them, at most --jobs at a time.
    Raises UserError where submitit or SLURM is missing, or a flag is wrong.
    """
    if args.pack < 1:
        raise UserError(f"--pack {args.pack}: should be at least 1")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError("--submit inside a SLURM array: submit from outside, or run without --submit")
    minutes(args.time)
    chosen = []
    for experiment in experiments:
        state = read_state(args.checkpoints, experiment)
        if state.name in ("finished", "running"):
            continue
        if state.name == "changed":
            print(f"{experiment.name}: left out, its folder was made by another command ({state.detail})")
        else:
            chosen.append(experiment)
    if not chosen:
        print(f"All {len(experiments)} experiments are finished or running: nothing to submit.")
        return 0
    work = units(chosen, args.pack)
    executor = _executor(args, work, folder)
    follow = _wait_locally if args.submit == "local" else _queue
    return follow(work, executor, args, folder)


def _executor(args, work, folder):
    """submitit's executor with what the flags ask for."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--submit needs submitit: pip install submitit") from error
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    logs = Path(args.checkpoints) / "logs" / "submitit" / "%j"
    if args.submit == "local":
        executor = submitit.LocalExecutor(folder=logs, max_num_timeout=REQUEUES)
        executor.update_parameters(timeout_min=minutes(args.time), gpus_per_node=args.gpus or 0)
        return executor
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError("--submit slurm: this machine has no sbatch and srun; --submit local does without")
    executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=REQUEUES)
    parameters = {
        "time": minutes(args.time),
        "nodes": 1,
        "ntasks_per_node": 1,
        "job_name": "rainbow",
        "cpus_per_task": _cpus(args, work),
        "partition": args.partition,
        "gpus_per_node": args.gpus,
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def _cpus(args, work):
    """Cores for a job: for each experiment at a time, one and its loader's processes."""
    workers = [
        int(flags[flags.index("-j") + 1])
        for unit in work
        for experiment in unit.experiments
        if "-j" in (flags := experiment.arguments)
    ]
    return (args.jobs or 1) * (1 + max(workers, default=1))


def _command(unit, args, folder):
    """run_exps.py on the experiments of a unit, with the flags that say where and how."""
    command = [sys.executable, str(folder / "run_exps.py"), "--scale", args.scale, "--jobs", str(args.jobs or 1)]
    for flag in ("--checkpoints", "--data", "--data-dir", "--device", "--start", *TRIAL_FLAGS):
        value = getattr(args, flag[2:].replace("-", "_"))
        command += [flag, value] if value is not None else []
    return [*command, "--name", *(experiment.name for experiment in unit.experiments)]


def _start(executor, unit, args, folder):
    unit.job = executor.submit(Job(_command(unit, args, folder)))
    print(f"job {unit.job.job_id}: {unit.label}", flush=True)


def _makers(work, unit):
    """The units whose experiments this one needs."""
    return [other for other in work if any(experiment.name in unit.needs for experiment in other.experiments)]


def _queue(work, executor, args, folder):
    """Submits everything to SLURM; a job starts when those it needs have ended well."""
    for unit in work:
        before = [other.job.job_id for other in _makers(work, unit)]
        extra = {"dependency": "afterok:" + ":".join(before), "kill-on-invalid-dep": "yes"} if before else {}
        executor.update_parameters(additional_parameters=extra)
        _start(executor, unit, args, folder)
    print(f"{len(work)} jobs are in the queue; --status follows them.")
    return 0


def _wait_locally(work, executor, args, folder):
    """Starts jobs on this machine as those they need end well, and waits for all."""
    waiting, active, failed = list(work), [], []
    try:
        while waiting or active:
            for unit in [unit for unit in active if unit.job.done()]:
                active.remove(unit)
                _report(unit, failed)
            for unit in list(waiting):
                makers = _makers(work, unit)
                if any(maker in failed for maker in makers):
                    print(f"{unit.label}: left out, what it needs failed")
                    waiting.remove(unit)
                    failed.append(unit)
                elif len(active) < (args.jobs or 1) and not any(m in waiting or m in active for m in makers):
                    waiting.remove(unit)
                    _start(executor, unit, args, folder)
                    active.append(unit)
            time.sleep(0.05)
    except KeyboardInterrupt:
        for unit in active:
            unit.job.cancel()
        raise StoppedError("interrupted, the jobs are told to stop; the same command goes on") from None
    print(f"{len(work) - len(failed)} of {len(work)} jobs ended well.")
    return 1 if failed else 0


def _report(unit, failed):
    error = unit.job.exception()
    if error is not None:
        failed.append(unit)
        print(f"job {unit.job.job_id}: {unit.label}: failed; its log is {unit.job.paths.stdout}")
        return
    print(f"job {unit.job.job_id}: {unit.label}: ended well")
