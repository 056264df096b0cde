"""Kills: programs that end at random moments, and what the next start makes of what they leave."""

import shutil
import signal
import time

from soak.programs import Program, experiments, run, sampling, training, wait_for
from utils.runs.folder import RunFolder


def training_killed(trial):
    """main_block.py, SIGKILL."""
    return _killed(trial, training)


def sampling_killed(trial):
    """resample.py, SIGKILL."""
    return _killed(trial, sampling, _trained(trial))


def runner_killed(trial):
    """run_exps.py, SIGKILL: alone, or with all that it has started.

    What it has started then gets SIGTERM: it may save once more, or die in the moment between its end and its lock's.
    """
    return _killed(trial, experiments, ignored=["previous.pt", "lock"])


def _trained(trial):
    """A folder that holds a finished training."""
    folder = trial.fresh("trained")
    trial.expect_status(run(training(folder)), 0)
    return folder


def _killed(trial, command, source=None, ignored=()):
    """Kills until there were enough, each run to its end in between, which should be that of an undisturbed run."""
    whole = trial.fresh("whole", source)
    began = time.monotonic()
    trial.expect_status(run(command(whole)), 0)
    seconds = time.monotonic() - began
    kills, runs, aimed = 0, 0, 0
    while kills < trial.kills and len(trial.failures) < 10:
        root = trial.fresh("run", source)
        runs += 1
        while True:
            with Program(command(root)) as program:
                in_a_write = _await_moment(trial, program, root, seconds)
                if program.poll() is not None:
                    break
                program.kill(with_children=trial.random.random() < 0.5)
            kills, aimed = kills + 1, aimed + in_a_write
            trial.expect_readable(root)
        trial.expect_status(program, 0)
        trial.expect_same(root, whole, ignored)
    return (
        f"{kills} kills survived ({aimed} of them while a file was half-written) in {runs} runs that ended in the "
        "bits of an undisturbed one; after each kill every file could be read"
    )


def _await_moment(trial, program, root, seconds):
    """Waits for a random moment, every other time for the next half-written file. Returns whether it is one."""
    moment = trial.random.uniform(0, seconds)
    is_aimed = trial.random.random() < 0.5
    program.wait(0.8 * moment if is_aimed else moment)
    if not is_aimed:
        return False
    wait_for(lambda: program.poll() is not None or _half_written(root), pause=0)
    return program.status is None


def _half_written(root):
    return any(path.name.endswith(".tmp") for path in root.rglob(".*"))


def terminated(trial):
    """main_block.py, SIGTERM as of a scheduler."""
    whole = trial.fresh("whole")
    began = time.monotonic()
    trial.expect_status(run(training(whole)), 0)
    seconds = time.monotonic() - began
    saved, early, slowest = 0, 0, 0.0
    while saved + early < trial.kills and len(trial.failures) < 10:
        root = trial.fresh("run")
        while True:
            with Program(training(root)) as program:
                program.wait(trial.random.uniform(0, seconds))
                if program.poll() is not None:
                    break
                had_begun = "epoch 0/" in program.output
                program.send(signal.SIGTERM)
                began = time.monotonic()
                program.wait()
            if program.status == 0:
                break
            slowest = max(slowest, time.monotonic() - began)
            trial.expect_status(program, 143, *(() if had_begun else (-signal.SIGTERM,)))
            if program.status == 143:
                saved += 1
                folder = RunFolder(root, "run")
                trial.expect(folder.status().get("state") == "stopped", f"{folder.path}: not called stopped")
                trial.expect("rerun the same command to resume" in program.last_line, program.output)
            else:
                early += 1
            trial.expect_readable(root)
        trial.expect_status(program, 0)
        trial.expect_same(root, whole, ignored=["previous.pt"])  # which may be that of the stop
    shutil.rmtree(whole)
    trial.expect(slowest < 30, f"the slowest needed {slowest:.1f} s")
    return (
        f"{saved} stops ended with a checkpoint and status 143, the slowest in {slowest:.1f} s "
        f"({early} more before training began); all went on to the same bits"
    )
