"""Several processes: torchrun's ranks train as one process does, and a run goes on with another number of them."""

import signal

from soak.programs import RESNET, Program, run, training, wait_for
from utils.runs.folder import RunFolder

TOLERANCE = 1e-4


def ranks(trial):
    """torchrun with gloo on CPUs."""
    root = trial.fresh("run")
    resnet = ["main_block.py", *RESNET, "--checkpoints", str(root)]
    worst = 0.0
    for name, command in (("scattering", training(root)), ("resnet", [*resnet, "--epochs", "1"])):
        trial.expect_status(run([*command, "--dir", f"{name}-one"]), 0)
        trial.expect_status(run(torchrun(2, [*command, "--dir", f"{name}-two"]), fresh=True), 0)
        worst = max(worst, _distance(trial, RunFolder(root, f"{name}-one"), RunFolder(root, f"{name}-two")))
    longer = training(root, "scattering-one", "--epochs", "14")
    trial.expect_status(run(longer), 0)
    for size, epochs in ((3, 13), (1, 14)):
        command = training(root, "scattering-two", "--epochs", epochs)
        trial.expect_status(run(command) if size == 1 else run(torchrun(size, command), fresh=True), 0)
    worst = max(worst, _distance(trial, RunFolder(root, "scattering-one"), RunFolder(root, "scattering-two")))
    said = (root / "scattering-two" / "log.txt").read_text()
    trial.expect("it is not scaled" in said, "nothing is said of the learning rate")
    _stopped(trial, root)
    return (
        f"losses of 2 ranks are those of one process within {worst:.0e}, a run of 2 went on with 3 and with 1; "
        "SIGTERM to torchrun ended all with one checkpoint"
    )


def torchrun(size, command):
    """The command with `size` ranks on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *command]


def _distance(trial, folder, other):
    """The largest relative difference between the losses of two runs."""
    rows, others = (each.checkpoint()["history"] for each in (folder, other))
    trial.expect(len(rows) == len(others), f"{folder.path}: other epochs than {other.path}")
    worst = max(
        abs(row[key] - its[key]) / abs(row[key])
        for row, its in zip(rows, others)
        for key in ("train_loss", "val_loss")
        if row[key] is not None
    )
    trial.expect(worst < TOLERANCE, f"losses in {folder.path} and {other.path} differ by {worst:.1e}")
    return worst


def _stopped(trial, root):
    """SIGTERM to torchrun: every rank ends, the state is saved, and the run goes on."""
    folder = RunFolder(root, "stopped")
    command = training(root, "stopped", "--epochs", "100000")
    with Program(torchrun(2, command), fresh=True) as program:
        trial.expect(wait_for(lambda: folder.file(1).exists()), "two ranks did not begin")
        program.send(signal.SIGTERM)
        program.wait()
    trial.expect(program.status not in (0, None), f"torchrun ended with {program.status}")
    status = folder.status()
    trial.expect(status.get("state") == "stopped", f"{status}\n{program.output[-2000:]}")
    trial.expect(not (folder.path / "lock").exists(), "the lock was left")
    ended = run(training(root, "stopped", "--epochs", str(status["epoch"] + 1)))
    trial.expect_status(ended, 0)
