"""The state of a training: all that is needed, besides its arguments, to resume it exactly."""

import copy
import math

import torch

from utils.errors import UserError, first_line
from utils.runs.checkpoints import checkpoint_of
from utils.runs.scores import History, Tally


class State:
    """Weights, optimiser, epochs done (`epoch`), steps done in the next (`step` of `steps`), their tally, the history.

    left_out: images of each epoch that are not trained on, for the last batch would be too small.
    """

    def __init__(self, network, datasets, args, world):
        self.network, self.datasets, self.args, self.world = network, datasets, args, world
        self.optimizer = make_optimizer(network, args)
        self.least_images = None
        images, size = len(datasets.train), args.batch_size
        rest = images % size
        self.left_out = rest if 0 < rest < self.least(rest) else 0
        self.steps = math.ceil((images - self.left_out) / size)
        self.history = History()
        self.start_epoch(0)

    def least(self, images):
        """How many images a batch must have, if this one has `images`: one for each process, and two if batch norm sees
        one value of each image."""
        if images > 1 or self.world.size > 1:
            return self.world.size
        if self.least_images is None:
            self.least_images = 2 if _needs_two(self.network, self.datasets.signal, self.world.device) else 1
        return self.least_images

    def check_batches(self):
        """Raises UserError if no batch is large enough to be trained on."""
        if not self.steps or self.world.size == 1 and self.args.batch_size < self.least(1):
            why = "two for batch norm" if self.world.size == 1 else f"one for each of {self.world.size} processes"
            found = f"{len(self.datasets.train)} images in batches of {self.args.batch_size} (--batch-size)"
            raise UserError(f"{found}: a batch needs at least {why}")

    def learning_rate(self, epoch):
        """In the epoch after `epoch` epochs: divided by 10 every --learning-rate-adjust-frequency epochs."""
        return self.args.lr * 0.1 ** (epoch // self.args.learning_rate_adjust_frequency)

    def start_epoch(self, epoch):
        """Moves to the start of the epoch after `epoch` epochs."""
        self.epoch, self.step = epoch, 0
        self.tally = Tally(self.steps, self.world.device)

    def restore(self, checkpoint, source, own):
        """Continues from the checkpoint in `source`: exactly from a run's last one, with a fresh optimiser from others.

        own: it is of the same run, which also has its best accuracy. Options win over what it holds. Returns in words
        what is not as it was. Raises UserError for a checkpoint that does not fit.
        """
        try:
            return self._restore(checkpoint, own)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            remedy = "--overwrite starts over" if own else "--restart takes only the weights"
            raise UserError(f"{source}: cannot be resumed: {what}; {remedy}") from error

    def _restore(self, checkpoint, own):
        self.start_epoch(int(checkpoint["epoch"]))
        best = checkpoint["best_acc1"] if own else None  # None too if the run was stopped before it had measured any
        self.history = History(best_acc1=None if best is None else float(best))
        if "tally" not in checkpoint:
            return []
        self.history.rows = list(checkpoint["history"])
        self._restore_momentum(checkpoint["optimizer"], checkpoint.get("learned"))
        random = checkpoint["random"]
        if self.world.is_main:
            torch.set_rng_state(random["cpu"])
        if self.world.is_main and "cuda" in random and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.world.device)
        now, stored, step = self.datasets.digest, checkpoint["args"], int(checkpoint["step"])
        changed = {name: old for name, old in checkpoint.get("data", {}).items() if old != now[name]}
        notes = [f"the data have changed: {name} was {old}, is {now[name]}" for name, old in changed.items()]
        order = [(stored.get(field), getattr(self.args, field)) for field in ("batch_size", "seed")]
        if step and ("train" in changed or any(old != new for old, new in order)):
            notes.append(f"epoch {self.epoch + 1} begins anew: it had other batches, of which {step} were done")
        elif step:
            rows, self.step = checkpoint["tally"], step
            self.tally = Tally(self.steps, self.world.device, rows if self.world.is_main else torch.zeros_like(rows))
        return notes

    def _restore_momentum(self, found, names):
        """The optimiser's momentum; rates and decays are those of the arguments. names: of the weights, if known."""
        groups, weights = self.optimizer.state_dict()["param_groups"], list(self._learned().values())
        sizes = [[len(group["params"]) for group in each] for each in (groups, found["param_groups"])]
        buffers = {index: state.get("momentum_buffer") for index, state in found["state"].items()}
        if (
            sizes[0] != sizes[1]
            or names not in (None, list(self._learned()))
            or any(buffer is not None and buffer.shape != weights[i].shape for i, buffer in buffers.items())
        ):
            raise ValueError("other weights were learned (frozen or regularised ones differ)")
        self.optimizer.load_state_dict({"state": found["state"], "param_groups": groups})

    def _learned(self):
        """{name: weight} of what the optimiser moves, in its order."""
        names = {id(weight): name for name, weight in self.network.named_parameters()}
        return {names[id(weight)]: weight for group in self.optimizer.param_groups for weight in group["params"]}

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
            "learned": list(self._learned()),
            "random": {"cpu": torch.get_rng_state(), **cuda},
            "data": self.datasets.digest,
            "step": self.step,
            "tally": rows.cpu(),
            "history": self.history.rows,
        }


def make_optimizer(network, args):
    """SGD with momentum on the weights that are learned, with weight decay on those that take it."""
    if hasattr(network, "parameter_groups"):
        groups = network.parameter_groups(args.weight_decay)
    else:
        groups = [{"params": [p for p in network.parameters() if p.requires_grad], "weight_decay": args.weight_decay}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, foreach=True)


def _needs_two(network, signal, device):
    """Whether a network cannot be trained on a single image: its batch norm would see a single value per channel."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            copy.deepcopy(network).train()(torch.zeros(1, signal.channels, signal.height, signal.width, device=device))
    except ValueError as error:
        return "more than 1 value" in str(error)
    return False
