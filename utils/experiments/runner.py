"""Runs experiments in the order of their needs, several at a time, whatever happens to any one of them.

What is finished is skipped, what was started goes on, a changed definition is reported, a failure is shown with the
end of its log while the independent rest goes on. Several runners may share a folder: each leaves to the others what
they are at.
"""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from utils.errors import DivergedError, StoppedError, UserError, WriteError
from utils.experiments.status import Clock, duration, read_state, remaining, work

MEANINGS = {UserError: "bad input", DivergedError: "it diverged", WriteError: "a file could not be written"}
PATIENCE = 30
TAIL = 15


@dataclasses.dataclass
class Settings:
    """How to run. root: of the checkpoints. folder: of the scripts. jobs: at a time. start: of `utils.processes`.

    data: ImageNet's folder or None. extra: flags for every command. gpus: names for CUDA_VISIBLE_DEVICES, or none.
    """

    root: Path
    folder: Path
    start: callable
    jobs: int = 1
    data: str | None = None
    extra: tuple = ()
    gpus: tuple = ()


@dataclasses.dataclass
class Run:
    """A process at work on an experiment; `log_start`: where in its log this attempt begins."""

    experiment: object
    process: object
    slot: int
    log: Path
    log_start: int
    started: float


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_job(jobs):
    """Threads for each of `jobs` processes: OMP_NUM_THREADS where it is set, an equal share of the cores otherwise."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // jobs))


def in_order(experiments):
    """The experiments with every one after those it needs, otherwise in their order."""
    listed, names = [], {experiment.name: experiment for experiment in experiments}

    def visit(experiment):
        if experiment.name in names:
            del names[experiment.name]
            for need in experiment.needs:
                if need in names:
                    visit(names[need])
            listed.append(experiment)

    for experiment in experiments:
        visit(experiment)
    return listed


def longest_first(experiments):
    """The experiments with those that head the longest chains of work first, every one after those it needs.

    Several processes at a time then end together, none waiting for one that began last.
    """
    behind, chains = {}, {}
    for experiment in reversed(in_order(experiments)):
        chains[experiment.name] = chain = work(experiment) + behind.get(experiment.name, 0)
        for need in experiment.needs:
            behind[need] = max(behind.get(need, 0), chain)
    return in_order(sorted(experiments, key=lambda experiment: -chains[experiment.name]))


class Runner:
    """Runs a list of experiments. `run` returns the exit status: 0 if all are finished in the end, 1 otherwise."""

    def __init__(self, experiments, settings, terminal=None):
        self.experiments = (longest_first if settings.jobs > 1 else in_order)(experiments)
        self.settings = settings
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.waiting = list(self.experiments)
        self.running, self.elsewhere = [], {}
        self.outcome = {}
        self.trained = 0
        self.clock, self.started = Clock(), time.monotonic()
        self.signal, self.interrupts = None, 0
        self._shown = 0.0

    def settle(self):
        """Ticks off what is finished already. Returns whether anything is left."""
        for experiment in list(self.waiting):
            if read_state(self.settings.root, experiment).name == "finished":
                self.waiting.remove(experiment)
                self.outcome[experiment.name] = "finished"
        return bool(self.waiting)

    def run(self):
        """Runs everything. Raises StoppedError after SIGINT or SIGTERM, once the processes have ended."""
        if self.settle() and self.outcome:
            self._say(f"{len(self.outcome)} of {len(self.experiments)} experiments are finished already.")
        before = {signum: signal.signal(signum, self._interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (self.waiting or self.running) and self.signal is None:
                self._reap()
                self._launch()
                self._show_progress()
                time.sleep(0.05 if self.running or not self.waiting else 0.5)
        finally:
            self._stop()
            for signum, handler in before.items():
                signal.signal(signum, handler)
        self._clear_line()
        if self.signal is not None:
            done = self._count("finished")
            raise StoppedError(
                f"stopped by a signal; {done} of {len(self.experiments)} experiments are finished, "
                "the same command goes on with the rest",
                self.signal,
            )
        return self._summary()

    # --- What can be started ---

    def _launch(self):
        """Settles what needs no process, and starts as many of the others as there are free slots."""
        for experiment in list(self.waiting):
            if self.signal is not None:
                return
            verdict = self._verdict(experiment)
            if verdict == "ready" and len(self.running) < self.settings.jobs:
                self.waiting.remove(experiment)
                self._start(experiment)
            elif verdict not in ("ready", "wait"):
                self.waiting.remove(experiment)
                self.outcome[experiment.name] = verdict

    def _verdict(self, experiment):
        """ "wait", "ready", or the outcome of an experiment for which there is nothing to do."""
        known = {other.name for other in self.waiting} | {run.experiment.name for run in self.running}
        if any(need in known for need in experiment.needs):
            return "wait"
        missing = [need for need in experiment.needs if self.outcome.get(need) != "finished"]
        if len(self.running) >= self.settings.jobs and not missing:
            return "wait"
        state = read_state(self.settings.root, experiment)
        if state.name == "finished":
            return "finished"
        if missing:
            self._say(f"{experiment.name}: left out, it needs {missing[0]}")
            return "blocked"
        if state.name == "changed":
            folder = self.settings.root / experiment.name
            self._say(
                f"{experiment.name}: left out, {folder} was made by another command ({state.detail}); "
                "move it away to run this one"
            )
            return "changed"
        if state.name == "running":
            self._leave_to(state.detail, experiment)
            return "wait"
        self.elsewhere.pop(experiment.name, None)
        if experiment.uses_imagenet and not self.settings.data:
            self._say(f"{experiment.name}: left out, it needs ImageNet: --data DIR or IMAGENET_DIR")
            return "blocked"
        return "ready"

    def _leave_to(self, holder, experiment):
        """Says, once, that another process is at an experiment."""
        if self.elsewhere.get(experiment.name) != holder:
            self.elsewhere[experiment.name] = holder
            self._say(f"{experiment.name}: in the hands of {holder}, waiting for it")

    # --- Processes ---

    def _start(self, experiment):
        log = self.settings.root / "logs" / f"{experiment.name}.log"
        slot = min(set(range(self.settings.jobs)) - {run.slot for run in self.running})
        command = experiment.command(sys.executable, self.settings.data, self.settings.extra)
        command[1] = str(self.settings.folder / command[1])
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                run = Run(experiment, None, slot, log, file.tell(), time.monotonic())
                run.process = self.settings.start(command, file, self._environment(slot))
        except OSError as error:
            self._fail(experiment, f"could not be started: {error}")
            return
        self.running.append(run)

    def _environment(self, slot):
        """The environment of the process in a slot: its share of the cores or its GPU."""
        environment = dict(os.environ, OMP_NUM_THREADS=threads_per_job(self.settings.jobs))
        environment.pop("SLURM_ARRAY_TASK_ID", None)
        if self.settings.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.settings.gpus[slot % len(self.settings.gpus)]
        return environment

    def _reap(self):
        """Settles the experiments whose processes have ended."""
        for run in list(self.running):
            status = run.process.poll()
            if status is None:
                continue
            self.running.remove(run)
            state = read_state(self.settings.root, run.experiment)
            if state.name == "finished":
                self._finish(run, state)
            elif state.name == "running":
                self._leave_to(state.detail, run.experiment)
                self.waiting.append(run.experiment)
            else:
                self._fail(run.experiment, _reason(status, state), _tail(run.log, run.log_start))

    def _finish(self, run, state):
        seconds = time.monotonic() - run.started
        self.clock.add(work(run.experiment), seconds)
        self.outcome[run.experiment.name] = "finished"
        self.trained += 1
        accuracy = "" if state.acc1 is None else f", {state.acc1:.1f} % top-1"
        self._say(f"{self._place()} {run.experiment.name}: finished in {duration(seconds)}{accuracy}{self._times()}")

    def _fail(self, experiment, reason, lines=()):
        self.outcome[experiment.name] = "failed"
        self._say(f"{self._place()} {experiment.name}: failed, {reason}")
        for line in lines:
            self._say(f"    {line}")

    def _interrupt(self, signum, frame):
        self.signal = signum
        self.interrupts += 1

    def _stop(self):
        """Ends the processes that still run: asks, waits for their checkpoints, and insists after a while."""
        deadline = time.monotonic() + PATIENCE
        for run in self.running:
            run.process.send(signal.SIGTERM)
        while any(run.process.poll() is None for run in self.running):
            if time.monotonic() > deadline or self.interrupts > 1:
                for run in self.running:
                    run.process.send(signal.SIGKILL)
            time.sleep(0.02)

    # --- What is said ---

    def _count(self, outcome):
        return sum(value == outcome for value in self.outcome.values())

    def _place(self):
        total = len(self.experiments)
        return f"[{len(self.outcome):>{len(str(total))}}/{total}]"

    def _times(self):
        left = 0
        for experiment in [*self.waiting, *(run.experiment for run in self.running)]:
            left += remaining(experiment, read_state(self.settings.root, experiment))
        foretold = self.clock.foretell(left) if left else None
        spent = duration(time.monotonic() - self.started)
        if foretold is None:
            return f"; {spent} so far"
        return f"; {spent} so far, about {duration(foretold / self.settings.jobs)} left"

    def _say(self, text):
        self._clear_line()
        print(text, flush=True)

    def _clear_line(self):
        if self.terminal:
            print("\r\033[K", end="", flush=True)

    def _show_progress(self):
        """Once a second on a terminal: how far, which are at work, how long, how long still."""
        if not self.terminal or time.monotonic() - self._shown < 1:
            return
        self._shown = time.monotonic()
        parts = []
        for run in self.running:
            state = read_state(self.settings.root, run.experiment)
            epoch = "" if state.epoch is None else f" (epoch {state.epoch}/{state.epochs})"
            parts.append(f"{run.experiment.name}{epoch}")
        line = f"{self._place()}{self._times()[1:]}: {', '.join(parts)}"
        print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def _summary(self):
        total, done = len(self.experiments), self._count("finished")
        if done == total and not self.trained:
            print(f"All {total} experiments are finished: nothing to do.")
            return 0
        others = [f"{self._count(name)} {name}" for name in ("failed", "changed", "blocked") if self._count(name)]
        spent = duration(time.monotonic() - self.started)
        print(f"{done} of {total} experiments are finished{''.join(', ' + other for other in others)} ({spent}).")
        return 0 if done == total else 1


def _reason(status, state):
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
    if status == 0:
        return f"it ended well but its folder says {state.name!r}"
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
    return [*text.rstrip().splitlines()[-TAIL:], f"(all of it: {log})"]
