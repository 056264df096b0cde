"""Submits experiments through submitit (an optional dependency) to SLURM, or to this machine in the same way.

Every job is `run_exps.py --name …` on its experiments, so that a requeued job skips what is finished and resumes what
was started. What an experiment needs becomes a dependency of its job.
"""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import RunError, StoppedError, UserError, first_line
from utils.experiments.processes import start_fresh
from utils.experiments.registry import TRIAL_FLAGS
from utils.experiments.status import read_state
from utils.files import read_json, write_json
from utils.runs.options import to

PATIENCE = 60  # seconds that a job has to save its state
REQUEUES = 1000


def add_arguments(group):
    """The flags of --submit."""
    limit = "time limit of a job as in sbatch (default 24:00:00), after which it saves its state and requeues"
    pack = "experiments per job, --jobs at a time (default 1)"
    group.add_argument("--partition", metavar="NAME", help="SLURM's partition")
    group.add_argument("--gpus", type=to.natural, metavar="N", help="GPUs per job (default: SLURM's own)")
    group.add_argument("--time", default="24:00:00", help=limit)
    group.add_argument("--pack", type=to.positive_int, default=1, metavar="N", help=pack)


def minutes(text):
    """SLURM's time limits in minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UserError(f"--time {text}: should be as in sbatch: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S")
    days, first, second, third = (number and int(number) for number in match.groups())
    if days is None and third is None:
        return first + -(-(second or 0) // 60)
    return (days or 0) * 1440 + first * 60 + (second or 0) + -(-(third or 0) // 60)


class Job:
    """What runs on a node: the runner on some experiments. submitit pickles it, calls it, and after SLURM's warning
    asks for a `checkpoint`: it stops the runner, whose processes save their state, and submits itself again."""

    def __init__(self, command):
        self.command, self._process = command, None

    def __call__(self):
        self._process = start_fresh(self.command, sys.stdout, dict(os.environ))
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

    def needs(self, other):
        """Whether an experiment of another unit must be finished before this one."""
        needed = {need for experiment in self.experiments for need in experiment.needs}
        return any(experiment.name in needed for experiment in other.experiments)

    @property
    def label(self):
        more = len(self.experiments) - 1
        return self.experiments[0].name + (f" and {more} more" if more else "")

    def start(self, executor, args, folder):
        """Submits run_exps.py on the experiments, with the flags that say where and how."""
        command = [sys.executable, str(folder / "run_exps.py"), "--scale", args.scale, "--jobs", str(args.jobs or 1)]
        for flag in ("--checkpoints", "--data", "--data-dir", "--device", "--start", *TRIAL_FLAGS):
            value = getattr(args, flag[2:].replace("-", "_"))
            command += [flag, value] if value is not None else []
        command += ["--name", *(experiment.name for experiment in self.experiments)]
        self.job = executor.submit(Job(command))
        print(f"job {self.job.job_id}: {self.label}", flush=True)


def levels(experiments, pack):
    """Lists of units of at most `pack` experiments, each list needing only what is in those before it."""
    depth, found = {}, {}
    for experiment in experiments:
        depth[experiment.name] = level = max((depth.get(need, -1) for need in experiment.needs), default=-1) + 1
        found.setdefault(level, []).append(experiment)
    return [[Unit(each[i : i + pack]) for i in range(0, len(each), pack)] for _, each in sorted(found.items())]


def submit(experiments, args, folder):
    """Submits what is neither finished, nor running, nor in the queue. Returns the exit status.

    SLURM: returns when all jobs are in the queue. Local: waits for them, at most --jobs at a time.
    Raises UserError if submitit or SLURM is missing, or a flag is wrong, RunError if SLURM refuses a job.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError("--submit inside a SLURM array: submit from outside, or run without --submit")
    limit, chosen = minutes(args.time), []
    for experiment in experiments:
        state = read_state(args.checkpoints, experiment)
        if state.name == "changed":
            print(f"{experiment.name}: skipped: its folder was made by another command ({state.detail})")
        elif state.name not in ("finished", "running"):
            chosen.append(experiment)
    if not chosen:
        print(f"All {len(experiments)} experiments are finished or running: nothing to submit.")
        return 0
    executor = _executor(args, limit, _cores_per_run(chosen), folder)
    if args.submit == "local":
        return _run_locally(levels(chosen, args.pack), executor, args, folder)
    jobs = _jobs_in_the_queue(args)
    waiting = [experiment for experiment in chosen if experiment.name in jobs]
    if waiting:
        print(f"{len(waiting)} experiments are in the queue already.")
    new = [experiment for experiment in chosen if experiment.name not in jobs]
    if not new:
        return 0
    return _queue([unit for level in levels(new, args.pack) for unit in level], jobs, executor, args, folder)


def _executor(args, limit, cores, folder):
    """submitit's executor with what the flags ask for; `limit`: of a job, in minutes; `cores`: of a run."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--submit needs submitit: pip install submitit") from error
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    where = {"folder": Path(args.checkpoints) / "logs" / "submitit" / "%j", "max_num_timeout": REQUEUES}
    if args.submit == "local":
        executor = submitit.LocalExecutor(**where)
        executor.update_parameters(timeout_min=limit, gpus_per_node=args.gpus or 0)
        return executor
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError("--submit slurm: this machine has no sbatch and srun; --submit local does without")
    executor = submitit.SlurmExecutor(**where)
    fixed = {"time": limit, "nodes": 1, "ntasks_per_node": 1, "job_name": "rainbow"}
    asked = {"cpus_per_task": (args.jobs or 1) * cores, "partition": args.partition, "gpus_per_node": args.gpus}
    executor.update_parameters(**fixed, **{key: value for key, value in asked.items() if value is not None})
    return executor


def _cores_per_run(experiments):
    """One for the training, and one for every process that loads its images."""
    commands = [experiment.arguments for experiment in experiments]
    return 1 + max((int(words[words.index("-j") + 1]) for words in commands if "-j" in words), default=1)


def _jobs_file(args):
    return Path(args.checkpoints) / "logs" / "submitit" / "jobs.json"


def _jobs_in_the_queue(args):
    """{experiment's name: id} of the jobs submitted before that SLURM still has. Raises RunError if it does not say."""
    known = {name: str(job) for name, job in read_json(_jobs_file(args), default={}).items()}
    if not known:
        return {}
    asked = subprocess.run(["squeue", "--noheader", "--format=%i", "--me"], capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = first_line(asked.stderr.strip() or f"exit status {asked.returncode}")
        raise RunError(f"squeue does not say which jobs are in the queue ({reason}): submit again when it answers")
    queued = {line.strip().partition("_")[0] for line in asked.stdout.splitlines()}
    return {name: job for name, job in known.items() if job in queued}


def _queue(work, jobs, executor, args, folder):
    """Submits units to SLURM; a job starts when those it needs have succeeded. jobs: in the queue, by experiment."""
    import submitit

    for done, unit in enumerate(work):
        needed = {need for experiment in unit.experiments for need in experiment.needs}
        before = sorted({jobs[name] for name in needed & jobs.keys()})
        extra = {"dependency": "afterok:" + ":".join(before), "kill-on-invalid-dep": "yes"} if before else {}
        executor.update_parameters(additional_parameters=extra)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # to which submitit copies sbatch's words
                unit.start(executor, args, folder)
        except (submitit.core.utils.FailedJobError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RunError(
                f"sbatch refused job {done + 1} of {len(work)}, {unit.label}: {lines[-1] if lines else error!r}; "
                f"{done} jobs are in the queue: rerun the same command for the rest once it takes more"
            ) from None
        jobs |= {experiment.name: str(unit.job.job_id) for experiment in unit.experiments}
        write_json(_jobs_file(args), jobs)
    print(f"{len(work)} jobs are in the queue; --status follows them.")
    return 0


def _run_locally(levels, executor, args, folder):
    """Runs the jobs on this machine, --jobs of a level at a time, and waits for them."""
    size, failed = args.jobs or 1, []
    for group in (level[i : i + size] for level in levels for i in range(0, len(level), size)):
        blocked = [unit for unit in group if any(map(unit.needs, failed))]
        started = [unit for unit in group if unit not in blocked]
        try:
            for unit in started:
                unit.start(executor, args, folder)
            errors = [unit.job.exception() for unit in started]
        except KeyboardInterrupt:
            for unit in filter(lambda unit: unit.job, started):
                unit.job.cancel()
            raise StoppedError("interrupted, the jobs are told to stop; rerun the same command to resume") from None
        for unit in blocked:
            print(f"{unit.label}: skipped: what it needs failed")
        for unit, error in zip(started, errors):
            end = "succeeded" if error is None else f"failed; its log is {unit.job.paths.stdout}"
            print(f"job {unit.job.job_id}: {unit.label}: {end}", flush=True)
        failed += blocked + [unit for unit, error in zip(started, errors) if error is not None]
    total = sum(map(len, levels))
    print(f"{total - len(failed)} of {total} jobs succeeded.")
    return 1 if failed else 0
