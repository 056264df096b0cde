"""Disks: writes that fail, and checkpoints that are no longer what was written."""

import itertools
import os
import re
import shutil

from soak.programs import FOLDER, Program, experiments, run, sampling, training, wait_for
from utils.runs.folder import RunFolder


def full(trial):
    """Every write of main_block.py and resample.py, and some of all that run_exps.py starts, on a full disk."""
    trained = trial.fresh("trained")
    trial.expect_status(run(training(trained)), 0)
    counts = {
        "main_block.py": _every_write_fails(trial, lambda root: training(root, "run", "--epochs", "2")),
        "resample.py": _every_write_fails(trial, lambda root: [*sampling(root), "--num-repeats", "2"], trained),
        "run_exps.py": _every_write_fails(trial, experiments, step=9),
    }
    counted = ", ".join(f"{count} of {script}" for script, count in counts.items())
    return f"{counted} failed, said which file, left all others whole; the next run ended in the same bits"


def _every_write_fails(trial, command, source=None, step=1):
    """Runs the command with its 1st, then its 2nd, … write failing, to the end in each case. Returns how many."""
    whole = trial.fresh("whole", source)
    trial.expect_status(run(command(whole)), 0)
    for count in itertools.count():
        root = trial.fresh("run", source)
        script, *arguments = command(root)
        with_limit = ["soak/full_disk.py", str(1 + count * step), str(root), str(FOLDER / script), *arguments]
        failed = run(with_limit)
        if "full_disk: " not in failed.output and failed.status == 0:
            trial.expect_same(root, whole)
            return count
        _judge(trial, failed, script, root)
        trial.expect_readable(root)
        trial.expect_status(run(command(root)), 0)
        trial.expect_same(root, whole)
        if len(trial.failures) > 10:
            return count
    return None


def _judge(trial, failed, script, root):
    """The program should have failed for the file that could not be written."""
    if script == "run_exps.py":
        trial.expect_status(failed, 1)
        trial.expect("could not be" in failed.output, failed.output)
        return
    trial.expect_status(failed, 2, 4)
    file = os.path.basename(re.search(r"full_disk: (.*)", failed.output)[1])
    name = re.match(r"\.?(\w+)", file)[1]
    name = {"probe": "lock", "previous": "last"}.get(name, name)  # what is tried out, or moved out of the way, for it
    trial.expect(
        f"could not write {root}" in failed.last_line
        and f"/{name}" in failed.last_line
        and "Traceback" not in failed.output,
        f"not named: {name}\n{failed.output}",
    )


DAMAGES = ("truncated", "flipped", "zeroed", "emptied", "removed")


def damaged(trial, rounds=30):
    """A last checkpoint that was truncated, or in which bits were flipped."""
    whole = trial.fresh("whole")
    trial.expect_status(run(training(whole)), 0)
    stopped = trial.fresh("stopped")
    with Program(training(stopped)) as program:
        folder = RunFolder(stopped, "run")
        wait_for(lambda: folder.file(1).exists() and folder.file("previous").exists(), pause=0)
        program.kill()
    noticed = harmless = 0
    for turn in range(rounds):
        root, kind = trial.fresh("run", stopped), DAMAGES[turn % len(DAMAGES)]
        if not folder.file("last").exists():  # the kill came between two renames
            kind = "removed"
        else:
            _damage(trial.random, kind, RunFolder(root, "run").file("last"))
        ended = run(training(root))
        trial.expect_status(ended, 0)
        trial.expect_same(root, whole)
        says = "WARNING" in ended.output
        trial.expect(says or kind in ("flipped", "zeroed", "removed"), f"{kind}, not noticed:\n{ended.output}")
        noticed, harmless = noticed + says, harmless + (not says and kind in ("flipped", "zeroed"))
    _both_damaged(trial, stopped)
    return (
        f"{rounds} checkpoints damaged ({', '.join(DAMAGES)}): {noticed} noticed and the one before used, "
        f"{harmless} in bits without meaning; all ended in the same bits; with both damaged nothing is removed"
    )


def _damage(random, kind, path):
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    if kind == "flipped":
        content[place] ^= 1 << random.randrange(8)
    elif kind == "zeroed":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    else:
        del content[place if kind == "truncated" else 0 :]
    path.write_bytes(content)
    if kind == "removed":
        path.unlink()


def _both_damaged(trial, stopped):
    root = trial.fresh("run", stopped)
    folder = RunFolder(root, "run")
    for which in ("last", "previous"):
        folder.file(which).write_bytes(b"nothing")
    before = sorted(path.name for path in folder.path.iterdir() if path.name != "lock")
    ended = run(training(root))
    trial.expect_status(ended, 2)
    trial.expect("previous.pt" in ended.last_line, ended.output)
    trial.expect(before == sorted(path.name for path in folder.path.iterdir()), "something was removed")
    shutil.rmtree(root)
