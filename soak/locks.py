"""Two at once on one folder: one holds it, the others are told who."""

from soak.programs import Program, run, sampling, training, wait_for
from utils.lock import Lock
from utils.runs.folder import RunFolder


def two_at_once(trial, races=6, starts=3):
    """Programs on a folder that is held, that a dead process held, and started together."""
    refused = _refused_while_held(trial)
    whole = trial.fresh("whole")
    trial.expect_status(run(training(whole)), 0)
    taken = 0
    for race in range(races):
        root = trial.fresh("run")
        if race % 2:
            with Program(training(root)) as program:
                wait_for(lambda root=root: (root / "run" / "lock").exists(), pause=0)
                program.kill()
            taken += 1
        refused += _race(trial, root, starts)
        trial.expect_status(run(training(root)), 0)
        trial.expect_same(root, whole)
    return (
        f"{refused} starts on a folder in use refused, its holder named; {taken} locks of killed processes taken; "
        f"{races} races of {starts} had one winner and the bits of an undisturbed run"
    )


def _refused_while_held(trial):
    """Trains and samples where another process is at work. Returns how many were refused."""
    root = trial.fresh("held")
    with Program(training(root, "run", "--epochs", "100000")) as holder:
        wait_for(lambda: RunFolder(root, "run").file(1).exists())
        second = run(training(root, "run", "--epochs", "100000"))
        trial.expect_status(second, 2)
        trial.expect(f"main_block.py, process {holder.pid} on " in second.last_line, second.output)
        trial.expect(holder.poll() is None, "the holder ended")
    trial.expect_status(run(training(root, "done")), 0)
    samples = RunFolder(root, "resamplings/resample-done")
    samples.create()
    with Lock(samples.path / "lock"):
        third = run(sampling(root, "done"))
    trial.expect_status(third, 2)
    trial.expect("is in use by" in third.last_line, third.output)
    trial.expect_status(run(sampling(root, "done")), 0)
    return 2


def _race(trial, root, starts):
    """Starts a training several times at once: whoever comes second is refused. Returns how many were."""
    programs = [Program(training(root)) for _ in range(starts)]
    for program in programs:
        with program:
            program.wait()
    won = [program for program in programs if program.status == 0]
    lost = [program for program in programs if program.status != 0]
    trial.expect(
        won and all(_is_refusal(program) for program in lost),
        "\n".join(f"{program.status}: {program.output}" for program in programs),
    )
    trial.expect(sum("already finished" not in program.output for program in won) == 1, "there were several winners")
    return len(lost)


def _is_refusal(program):
    return program.status == 2 and any(text in program.last_line for text in ("is in use by", "has just trained"))
