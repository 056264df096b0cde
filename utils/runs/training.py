"""Training: epochs of SGD, validation, schedule; stops and goes on at any step without a trace in the result.

A training is a function of its arguments: batches and augmentation depend on (seed, epoch) alone, the rest is in the
last checkpoint. So a run that was interrupted, killed or moved ends in the same weights, bit for bit, on the same
machine with the same number of threads.
"""

import contextlib
import itertools
import math
import signal
import time
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from models.block import exclude_from_compilation
from utils.errors import DivergedError, StoppedError, UserError
from utils.runs.checkpoints import checkpoint_of, is_saved_epoch, save
from utils.runs.ranks import keep_complex, share_batch_norm

MEETING = 16  # steps between two exchanges of stop requests among ranks


@dataclass(frozen=True)
class Score:
    """Mean loss (nats), top-1 and top-5 accuracy (%) over `images` images."""

    loss: float
    acc1: float
    acc5: float
    images: int


class Tally:
    """Loss and hits of every step of an epoch, on the device until they are asked for."""

    def __init__(self, steps, device, rows=None):
        steps = max(steps, 0 if rows is None else len(rows))
        self.rows = torch.zeros(steps, 4, device=device)  # sum of losses, top-1 hits, top-5 hits, images
        if rows is not None:
            self.rows[: len(rows)] = rows.to(device)

    @torch.no_grad()
    def add(self, step, logits, labels, loss):
        """Adds the step number `step` (from 0): logits (B, classes), labels (B,), sum of losses ()."""
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = (best == labels[:, None]).float()
        self.rows[step, :3] = torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        self.rows[step, 3] = len(labels)

    def score(self, steps, world):
        """The `Score` of the first `steps` steps on all ranks, and the first of them (from 1) whose loss is not finite.

        A meeting of all ranks. Returns (score, step or None).
        """
        rows = world.sum(self.rows[:steps].clone()).cpu().double()
        total = rows.sum(0)
        images = int(total[3])
        loss, acc1, acc5 = (total[:3] / max(images, 1)).tolist()
        bad = (~rows[:, 0].isfinite()).nonzero().flatten().tolist()
        return Score(loss, 100 * acc1, 100 * acc5, images), bad[0] + 1 if bad else None


class StopRequest:
    """A context in which SIGTERM and Ctrl-C are noted in `signum`; a second Ctrl-C interrupts at once."""

    signum = None

    def __enter__(self):
        self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum


class Training:
    """One training: `run` it, from the start or from where `restore` puts it.

    Args:
        network: the module, on its device.
        datasets: `train` and `val` of `utils.datasets`.
        args: resolved arguments (`utils.runs.options.parse`).
        world: the processes that share the work (`utils.runs.ranks.World`).
        log: a `RunLog`, whose folder takes the checkpoints.
    """

    def __init__(self, network, datasets, args, world, log):
        self.network, self.datasets, self.args, self.world, self.log = network, datasets, args, world, log
        self.optimizer = make_optimizer(network, args)
        self.forward, self.forward_alone = _wrapped(network, args, world)
        self.epoch = self.step = 0  # epochs done, steps done in the next
        self.best_acc1 = None
        self.history = []  # a row of metrics for every epoch, from 0
        self.steps, self.left_out = _steps(len(datasets.train), args.batch_size, world)
        self.tally = Tally(self.steps, world.device)
        self.stop = StopRequest()

    def restore(self, checkpoint):
        """Goes on from a checkpoint: exactly from a run's last one, with a fresh optimiser from any other.

        Raises KeyError, TypeError, ValueError or RuntimeError for one that does not fit.
        """
        self.epoch = int(checkpoint["epoch"])
        best = checkpoint["best_acc1"]  # None where a run was stopped before it had measured any
        self.best_acc1 = None if best is None else float(best)
        if "tally" not in checkpoint:
            return
        self.history = list(checkpoint["history"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        _set_random_state(checkpoint["random"], self.world)
        if checkpoint["args"]["batch_size"] == self.args.batch_size:
            self.step = int(checkpoint["step"])
            rows = checkpoint["tally"]
            self.tally = Tally(self.steps, self.world.device, rows if self.world.is_main else torch.zeros_like(rows))

    def run(self):
        """Trains to the last epoch. Raises StoppedError, its state saved, DivergedError or WriteError."""
        with self.stop:
            if not self.history:
                self._record(None, self.validate(), 0.0)
            while self.epoch < self.args.epochs:
                train, speed = self._train_epoch()
                val = self.validate()
                self.epoch, self.step = self.epoch + 1, 0
                self.tally = Tally(self.steps, self.world.device)
                self._record(train, val, speed)
        self._status("finished")

    def learning_rate(self, epoch):
        """In the epoch after `epoch` epochs: divided by 10 every --learning-rate-adjust-frequency epochs."""
        return self.args.lr * 0.1 ** (epoch // self.args.learning_rate_adjust_frequency)

    def _train_epoch(self):
        """The rest of an epoch. Returns its Score and images per second."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.epoch)
        self.network.train()
        first, began = self.step, time.perf_counter()
        with self.log.bar(self.steps, first, f"epoch {self.epoch + 1}/{self.args.epochs}") as bar:
            batches = self._batches(self.datasets.train, train=True, start=first)
            for images, labels in itertools.islice(batches, max(self.steps - first, 0)):
                if self._must_stop(self.step):
                    self._stop()
                if len(labels) or self.world.size > 1:
                    self.tally.add(self.step, *self._train_step(images, labels))
                self.step += 1
                bar.update(1)
                if self.step % self.args.print_freq == 0 and self.step < self.steps:
                    self._report(bar)
            score = self._score()
        done = score.images * (self.step - first) / max(self.step, 1)
        return score, done / (time.perf_counter() - began)

    def _train_step(self, images, labels):
        """One step of SGD on this rank's images. Returns logits, labels and the sum of losses, for the tally."""
        with self._autocast():
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self._weight(len(labels))).backward()
        self.optimizer.step()
        if hasattr(self.network, "after_step"):
            self.network.after_step()
        return logits.detach(), labels, loss.detach()

    def _weight(self, count):
        """What makes of this rank's sum of losses its part of the mean, as DistributedDataParallel averages it."""
        if self.world.size == 1:
            return 1 / count
        left = len(self.datasets.train) - self.step * self.args.batch_size
        return self.world.size / min(self.args.batch_size, left)

    def validate(self):
        """The Score on the validation set. Raises DivergedError; StoppedError as `run`."""
        dataset, steps = self.datasets.val, math.ceil(len(self.datasets.val) / self.args.batch_size)
        tally = Tally(steps, self.world.device)
        self.network.eval()
        with torch.no_grad(), self._autocast(), self.log.bar(steps, 0, "validation") as bar:
            for step, (images, labels) in enumerate(self._batches(dataset, train=False)):
                if self._must_stop(step):
                    self._stop()
                if len(labels):
                    logits = self.forward_alone(images).float()
                    tally.add(step, logits, labels, F.cross_entropy(logits, labels, reduction="sum"))
                bar.update(1)
        score, bad = tally.score(steps, self.world)
        if bad:
            self._diverged(f"validation after epoch {self.epoch + (self.step > 0)}, step {bad} of {steps}")
        return score

    def _batches(self, dataset, train, start=0):
        return dataset.loader(
            self.args.batch_size,
            shuffle=train,
            seed=self.args.seed,
            epoch=self.epoch,
            augment=train,
            start_step=start,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.args.workers,
            device=self.world.device,
            bad_images=self.args.bad_images,
        )

    def _autocast(self):
        if not self.args.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _must_stop(self, step):
        if self.world.size == 1:
            return self.stop.signum is not None
        return step % MEETING == 0 and self.world.any(self.stop.signum is not None)

    def _stop(self):
        """Saves the state as it is, within an epoch if need be. Raises StoppedError."""
        self._score()
        checkpoint = self._state()
        if self.log.folder is not None:
            self.log.folder.save_last(checkpoint)
        where = f"epoch {self.epoch + 1}, step {self.step} of {self.steps}"
        self._status("stopped", f"stopped in {where}")
        raise StoppedError(
            f"stopped in {where}; saved, the same command goes on from there", self.stop.signum or signal.SIGTERM
        )

    def _score(self):
        """The Score of the epoch so far. Raises DivergedError."""
        score, bad = self.tally.score(self.step, self.world)
        if bad:
            self._diverged(f"epoch {self.epoch + 1}, step {bad} of {self.steps}")
        return score

    def _diverged(self, where):
        kept = f"the last checkpoint is of epoch {self.epoch}" if self.history else "no checkpoint was made yet"
        raise DivergedError(f"{where}: the loss is not a finite number; {kept} (a smaller --lr may help)")

    def _report(self, bar):
        score = self._score()
        bar.set_postfix_str(f"loss {score.loss:.3f} acc1 {score.acc1:.1f}", refresh=False)
        if bar.disable:
            self.log.say(
                f"epoch {self.epoch + 1}/{self.args.epochs}  step {self.step}/{self.steps}  "
                f"loss {score.loss:.4f}  acc1 {score.acc1:.2f}"
            )

    def _record(self, train, val, speed):
        """Writes what an epoch has given; last.pt comes last, so that a kill before it repeats the epoch."""
        rate = self.learning_rate(max(self.epoch - 1, 0))
        self.history.append(
            {
                "epoch": self.epoch,
                "lr": rate,
                "images_per_second": speed if train else None,
                **{f"train_{key}": getattr(train, key) if train else None for key in ("loss", "acc1", "acc5")},
                **{f"val_{key}": getattr(val, key) for key in ("loss", "acc1", "acc5")},
            }
        )
        is_best = self.best_acc1 is None or val.acc1 > self.best_acc1
        self.best_acc1 = max(val.acc1, self.best_acc1 or 0.0)
        self.log.say(self._line(train, val, rate, speed))
        folder = self.log.folder
        if folder is None:
            return
        plain = checkpoint_of(self.network, self.args, self.epoch, self.best_acc1)
        if is_saved_epoch(self.epoch):
            save(folder.file(self.epoch), plain)
        if is_best:
            save(folder.file("best"), plain)
        self.log.metrics(self.history)
        folder.save_last(self._state())
        self._status("running")

    def _line(self, train, val, rate, speed):
        parts = [f"epoch {self.epoch}/{self.args.epochs}"]
        if train:
            parts.append(f"train loss {train.loss:.4f} acc1 {train.acc1:.2f}")
        parts.append(f"val loss {val.loss:.4f} acc1 {val.acc1:.2f} acc5 {val.acc5:.2f} (best {self.best_acc1:.2f})")
        if train:
            parts.append(f"lr {rate:g}  {speed:.0f} images/s")
        return "  ".join(parts)

    def _state(self):
        """Everything a run needs to go on exactly. A meeting of all ranks within an epoch."""
        rows = self.tally.rows[: self.step].clone()
        if self.step:
            self.world.sum(rows)
        return {
            **checkpoint_of(self.network, self.args, self.epoch, self.best_acc1),
            "optimizer": self.optimizer.state_dict(),
            "random": _random_state(self.world.device),
            "step": self.step,
            "tally": rows.cpu(),
            "history": self.history,
        }

    def _status(self, state, message=""):
        acc1 = self.history[-1]["val_acc1"] if self.history else None
        self.log.status(state, self.epoch, self.args.epochs, acc1, self.best_acc1, message)


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


def _wrapped(network, args, world):
    """The network as it is called in training, by all ranks together, and alone."""
    shared = network
    if world.size > 1:
        share_batch_norm(network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for this argument
            keep_complex(network)
            shared = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
    if not args.compile:
        return shared, network
    exclude_from_compilation(network)
    return torch.compile(shared), torch.compile(network)


def _random_state(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state, world):
    if not world.is_main:
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)
