"""Runs experiments in the order of their needs, several at a time, whatever happens to any one of them.

Finished ones are skipped, started ones resumed, a changed definition is reported, and a failure is shown with the end
of its log while unrelated experiments continue. Several runners may share a folder: each skips what another is running.
"""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from utils import machine
from utils.errors import DivergedError, StoppedError, UserError, WriteError
from utils.experiments.status import duration, read_state, remaining, work

MEANINGS = {UserError: "bad input", DivergedError: "it diverged", WriteError: "a file could not be written"}
PATIENCE = 30  # seconds that processes have to save their state
TAIL = 15  # lines of a log


@dataclasses.dataclass
class Run:
    """A process that runs an experiment. log_start: where this attempt begins in its log."""

    experiment: object
    slot: int
    log: Path
    log_start: int
    started: float
    process: object = None


def threads_per_job(jobs):
    """Threads for each of `jobs` processes: OMP_NUM_THREADS if it is set, an equal share of the cores otherwise."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, machine.cores() // jobs))


def longest_first(experiments):
    """The experiments, each listed after those it needs, with those at the head of the longest chains of work first.

    Several processes at a time then end together, none waiting for one that began last; needs still come first.
    """
    chains = {}
    for experiment in reversed(experiments):
        chains[experiment.name] = chain = work(experiment) + chains.get(experiment.name, 0)
        for need in experiment.needs:
            chains[need] = max(chains.get(need, 0), chain)
    return sorted(experiments, key=lambda experiment: -chains[experiment.name])


class Runner:
    """Runs experiments, each listed after those it needs, `jobs` at a time, in folders under `root`.

    start: (experiment, log file, environment) -> its process, as of `utils.experiments.processes`.
    gpus: names for CUDA_VISIBLE_DEVICES. has_imagenet: whether ImageNet is available. `run` returns the exit status.
    """

    def __init__(self, experiments, root, start, jobs=1, gpus=(), has_imagenet=False):
        self.root, self.start, self.jobs, self.gpus, self.has_imagenet = root, start, jobs, gpus, has_imagenet
        self.waiting = longest_first(experiments) if jobs > 1 else list(experiments)
        self.running, self.outcome, self.elsewhere, self.signals = [], {}, {}, []
        self.report = Report(experiments, self.outcome, root)

    def run(self):
        """Runs everything: 0 if all are finished in the end, 1 otherwise.

        Raises StoppedError after SIGINT or SIGTERM, once the processes have ended.
        """
        for experiment in list(self.waiting):
            if read_state(self.root, experiment).name == "finished":
                self._settle(experiment, "finished")
        if self.waiting and self.outcome:
            self.report.say(f"{self.report.finished()} already.")
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(each, lambda signum, frame: self.signals.append(signum)) for each in signals]
        try:
            while (self.waiting or self.running) and not self.signals:
                self._reap()
                self._launch()
                self.report.progress(self.running)
                time.sleep(0.05 if self.running or not self.waiting else 0.5)
        finally:
            self._stop()
            for each, handler in zip(signals, before):
                signal.signal(each, handler)
        if self.signals:
            self.report.clear_line()
            done = self.report.finished()
            raise StoppedError(f"stopped by a signal; {done}, rerun the same command for the rest", self.signals[-1])
        return self.report.summary()

    def _settle(self, experiment, outcome, reason=""):
        """Settles an experiment that was waiting; `reason`: why it is skipped."""
        self.waiting.remove(experiment)
        self.outcome[experiment.name] = outcome
        if reason:
            self.report.say(f"{experiment.name}: skipped: {reason}")

    def _launch(self):
        """Settles what needs no process, and starts as many of the others as there are free slots."""
        for experiment in list(self.waiting):
            if self.signals:
                return
            unsettled = {other.name for other in [*self.waiting, *(run.experiment for run in self.running)]}
            missing = [need for need in experiment.needs if self.outcome.get(need) != "finished"]
            if not unsettled & set(experiment.needs) and (missing or len(self.running) < self.jobs):
                self._launch_one(experiment, missing)

    def _launch_one(self, experiment, missing):
        state = read_state(self.root, experiment)
        if state.name == "finished":
            self._settle(experiment, "finished")
        elif missing:
            self._settle(experiment, "blocked", f"requires {missing[0]}")
        elif state.name == "changed":
            reason = f"{self.root / experiment.name} was made by another command ({state.detail})"
            self._settle(experiment, "changed", f"{reason}; move it away to run this one")
        elif state.name == "running":
            self._leave_to(state.detail, experiment)
        elif experiment.uses_imagenet and not self.has_imagenet:
            self._settle(experiment, "blocked", "requires ImageNet: --data DIR or IMAGENET_DIR")
        else:
            self.elsewhere.pop(experiment.name, None)
            self.waiting.remove(experiment)
            self._start(experiment)

    def _leave_to(self, holder, experiment):
        """Says, once, that another process runs an experiment."""
        if self.elsewhere.get(experiment.name) != holder:
            self.elsewhere[experiment.name] = holder
            self.report.say(f"{experiment.name}: already being run by {holder}, waiting for it")

    def _start(self, experiment):
        log = self.root / "logs" / f"{experiment.name}.log"
        slot = min(set(range(self.jobs)) - {run.slot for run in self.running})
        environment = {key: value for key, value in os.environ.items() if key != "SLURM_ARRAY_TASK_ID"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                run = Run(experiment, slot, log, file.tell(), time.monotonic())
                run.process = self.start(experiment, file, environment)
                self.running.append(run)
        except OSError as error:
            self._fail(experiment, f"could not be started: {error}")

    def _reap(self):
        """Settles the experiments whose processes have ended."""
        for run in list(self.running):
            status = run.process.poll()
            if status is None:
                continue
            self.running.remove(run)
            state = read_state(self.root, run.experiment)
            if state.name == "finished":
                self.outcome[run.experiment.name] = "finished"
                self.report.trained(run, state)
            elif state.name == "running":
                self._leave_to(state.detail, run.experiment)
                self.waiting.append(run.experiment)
            else:
                self._fail(run.experiment, _reason(status, state), _tail(run.log, run.log_start))

    def _fail(self, experiment, reason, lines=()):
        self.outcome[experiment.name] = "failed"
        self.report.say(f"{self.report.place()} {experiment.name}: failed, {reason}", *lines)

    def _stop(self):
        """Ends the processes that still run: asks, waits for their checkpoints, and insists after a while."""
        deadline = time.monotonic() + PATIENCE
        for run in self.running:
            run.process.send(signal.SIGTERM)
        while any(run.process.poll() is None for run in self.running):
            if time.monotonic() > deadline or len(self.signals) > 1:
                for run in self.running:
                    run.process.send(signal.SIGKILL)
            time.sleep(0.02)


class Report:
    """What a run prints: lines, and on a terminal one more that shows progress. `outcome`: name -> how it ended."""

    def __init__(self, experiments, outcome, root):
        self.experiments, self.outcome, self.root = experiments, outcome, root
        self.terminal = sys.stdout.isatty()
        self.begun, self.work, self.shown, self.trained_here = time.monotonic(), self._left(), 0.0, 0

    def say(self, text, *more):
        self.clear_line()
        print(text, *(f"    {line}" for line in more), sep="\n", flush=True)

    def clear_line(self):
        if self.terminal:
            print("\r\033[K", end="", flush=True)

    def place(self):
        """How many are settled, "[ 3/12]"."""
        total = len(self.experiments)
        return f"[{len(self.outcome):>{len(str(total))}}/{total}]"

    def finished(self):
        return f"{list(self.outcome.values()).count('finished')} of {len(self.experiments)} experiments are finished"

    def _left(self):
        unsettled = [experiment for experiment in self.experiments if experiment.name not in self.outcome]
        return sum(remaining(experiment, read_state(self.root, experiment)) for experiment in unsettled)

    def times(self):
        """The time spent and, if anything has been done, the time that the rest takes at the same pace."""
        spent, left = time.monotonic() - self.begun, self._left()
        done = self.work - left
        return f"{duration(spent)} so far" + (
            f", about {duration(spent * left / done)} left" if left and done > 0 else ""
        )

    def trained(self, run, state):
        """Says that a run has finished."""
        self.trained_here += 1
        accuracy = "" if state.acc1 is None else f", {state.acc1:.1f} % top-1"
        spent = duration(time.monotonic() - run.started)
        self.say(f"{self.place()} {run.experiment.name}: finished in {spent}{accuracy}; {self.times()}")

    def progress(self, running):
        """Once a second on a terminal: how far, which are running, the time spent and left."""
        if not self.terminal or time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        states = [(run.experiment.name, read_state(self.root, run.experiment)) for run in running]
        parts = [name + (f" (epoch {state.epoch}/{state.epochs})" if state.epoch else "") for name, state in states]
        line = f"{self.place()} {self.times()}: {', '.join(parts)}"
        print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def summary(self):
        """Prints the last line. Returns the exit status."""
        outcomes = list(self.outcome.values())
        done = set(outcomes) <= {"finished"}
        if done and not self.trained_here:
            self.say(f"All {len(outcomes)} experiments are finished: nothing to do.")
        else:
            others = [
                f", {outcomes.count(name)} {name}" for name in ("failed", "changed", "blocked") if name in outcomes
            ]
            self.say(f"{self.finished()}{''.join(others)} ({duration(time.monotonic() - self.begun)}).")
        return 0 if done else 1


def _reason(status, state):
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
    if status == 0:
        return f"exited with 0, but its folder says {state.name!r}"
    known = {error.exit_status: word for error, word in MEANINGS.items()}
    return f"exit status {status}" + (f" ({known[status]})" if status in known else "")


def _tail(log, start):
    """The last lines that a process wrote."""
    try:
        with open(log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - 20_000))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return [f"(its log cannot be read: {error})"]
    return [*text.rstrip().splitlines()[-TAIL:], f"(full log: {log})"]
