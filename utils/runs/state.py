"""The state of a training: all that is needed, besides its arguments, to resume it exactly."""

import math

import torch

from utils.errors import UserError
from utils.runs.checkpoints import checkpoint_of
from utils.runs.scores import History, Tally


class State:
    """Weights, optimiser, epochs done (`epoch`), steps done in the next (`step` of `steps`), their tally, the history.

    left_out: images of each epoch that are not trained on, fewer than the processes. Raises UserError if there are too
    few images for all processes.
    """

    def __init__(self, network, datasets, args, world):
        self.network, self.datasets, self.args, self.world = network, datasets, args, world
        self.optimizer = make_optimizer(network, args)
        self.steps, self.left_out = _steps(len(datasets.train), args.batch_size, world)
        self.history = History()
        self.start_epoch(0)

    def learning_rate(self, epoch):
        """In the epoch after `epoch` epochs: divided by 10 every --learning-rate-adjust-frequency epochs."""
        return self.args.lr * 0.1 ** (epoch // self.args.learning_rate_adjust_frequency)

    def start_epoch(self, epoch):
        """Moves to the start of the epoch after `epoch` epochs."""
        self.epoch, self.step = epoch, 0
        self.tally = Tally(self.steps, self.world.device)

    def restore(self, checkpoint):
        """Continues from a checkpoint: exactly from a run's last one, with a fresh optimiser from any other.

        Raises KeyError, TypeError, ValueError or RuntimeError for one that does not fit.
        """
        self.start_epoch(int(checkpoint["epoch"]))
        best = checkpoint["best_acc1"]  # None if a run was stopped before it had measured any
        self.history = History(best_acc1=None if best is None else float(best))
        if "tally" not in checkpoint:
            return
        self.history.rows = list(checkpoint["history"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        random = checkpoint["random"]
        if self.world.is_main:
            torch.set_rng_state(random["cpu"])
        if self.world.is_main and "cuda" in random and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.world.device)
        if checkpoint["args"]["batch_size"] == self.args.batch_size:
            self.step = int(checkpoint["step"])
            rows = checkpoint["tally"]
            self.tally = Tally(self.steps, self.world.device, rows if self.world.is_main else torch.zeros_like(rows))

    def plain(self):
        """The checkpoint of the weights alone."""
        return checkpoint_of(self.network, self.args, self.datasets, self.epoch, self.history.best_acc1)

    def checkpoint(self):
        """The checkpoint of everything. Collective within an epoch: every rank must call it."""
        rows = self.tally.rows[: self.step].clone()
        if self.step:
            self.world.sum(rows)
        device = self.world.device
        cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        return {
            **self.plain(),
            "optimizer": self.optimizer.state_dict(),
            "random": {"cpu": torch.get_rng_state(), **cuda},
            "step": self.step,
            "tally": rows.cpu(),
            "history": self.history.rows,
        }


def _steps(images, batch_size, world):
    """Steps of an epoch, and how many images are left out because they are fewer than the processes."""
    rest = images % batch_size
    if images < world.size:
        raise UserError(f"{images} images for training are fewer than the {world.size} processes")
    if 0 < rest < world.size:
        return images // batch_size, rest
    return math.ceil(images / batch_size), 0


def make_optimizer(network, args):
    """SGD with momentum on the weights that are learned, with weight decay on those that take it."""
    if hasattr(network, "parameter_groups"):
        groups = network.parameter_groups(args.weight_decay)
    else:
        groups = [{"params": [p for p in network.parameters() if p.requires_grad], "weight_decay": args.weight_decay}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, foreach=True)
