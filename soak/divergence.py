"""A loss that is not a finite number ends a run, and says where."""

import re

import torch

from soak.programs import RESNET, run, training
from utils.runs.checkpoints import load, save
from utils.runs.folder import RunFolder

WHERE = re.compile(r"epoch \d+, step \d+ of \d+: the loss is not a finite number")


def diverged(trial):
    """Learning rates that no network survives, and weights that are no numbers."""
    root = trial.fresh("run")
    commands = {
        "norm": training(root, "norm", "--lr", "1e30"),
        "plain": training(root, "plain", "-a", "Fw Std Pr", "--lr", "1e30"),
        "resnet": ["main_block.py", *RESNET, "--lr", "1e20", "--checkpoints", str(root), "--dir", "resnet"],
    }
    for name, command in commands.items():
        ended = run(command)
        trial.expect_status(ended, 3)
        trial.expect(WHERE.search(ended.last_line), ended.output)
        folder = RunFolder(root, name)
        kept = folder.checkpoint()
        finite = all(value.isfinite().all() for value in kept["state_dict"].values())
        trial.expect(finite and f"the last checkpoint is of epoch {kept['epoch']}" in ended.last_line, ended.output)
        trial.expect(folder.status().get("state") == "failed", f"{folder.path}: not called failed")
        trial.expect_readable(root)
    spoiled = load(RunFolder(root, "norm").file())
    next(iter(spoiled["state_dict"].values())).view(-1)[0] = torch.nan
    save(root / "nan.pt", spoiled)
    ended = run(training(root, "nan", "--resume", root / "nan.pt", "--restart"))
    trial.expect_status(ended, 3)
    trial.expect("validation after epoch 0, step 1" in ended.last_line, ended.output)
    return f"{len(commands) + 1} runs ended with status 3, epoch and step, the last finite checkpoint kept"
