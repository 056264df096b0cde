"""Training: SGD, validation, schedule; it can be stopped and resumed at any step without affecting the result.

A training is a function of its arguments: batches and augmentation depend on (seed, epoch) alone, the rest is in the
last checkpoint. A run that was interrupted, killed or moved therefore ends in the same weights, bit for bit, on the
same machine with the same number of threads.
"""

import contextlib
import itertools
import math
import signal
import time

import torch

from models.block import exclude_from_compilation
from utils.errors import DivergedError, StoppedError
from utils.runs.checkpoints import is_saved_epoch, save
from utils.runs.ranks import shared
from utils.runs.scores import Tally, sum_of_losses
from utils.runs.state import State

SYNC_EVERY = 16  # steps between two exchanges of stop requests among ranks


class Training:
    """One training: `run` it, from the start or from where its `state` was restored to.

    `network` is on the device of `world`; `datasets` are those of `load_datasets`, `args` those of `options.parse`; the
    folder of `log` takes the checkpoints; `stop` is an entered StopRequest.
    """

    def __init__(self, network, datasets, args, world, log, stop):
        self.network, self.datasets, self.args, self.world = network, datasets, args, world
        self.log, self.stop = log, stop
        self.state = State(network, datasets, args, world)
        self.forward, self.forward_alone = shared(network, world), network  # by all ranks together, and alone
        if args.compile:
            exclude_from_compilation(network)
            self.forward, self.forward_alone = torch.compile(self.forward), torch.compile(network)

    def run(self):
        """Trains to the last epoch. Raises StoppedError, its state saved, DivergedError or WriteError."""
        state = self.state
        with self.stop.later():
            if not state.history.rows:
                self._record(None, self.validate(), 0.0)
            while state.epoch < self.args.epochs:
                train, speed = self._train_epoch()
                val = self.validate()
                state.start_epoch(state.epoch + 1)
                self._record(train, val, speed)
        self._status("finished")

    def _train_epoch(self):
        """The rest of an epoch. Returns its Score and images per second."""
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = state.learning_rate(state.epoch)
        self.network.train()
        first, began = state.step, time.perf_counter()
        with self.log.bar(state.steps, first, f"epoch {state.epoch + 1}/{self.args.epochs}") as bar:
            batches = self._batches(self.datasets.train, train=True, start=first)
            for images, labels in itertools.islice(batches, max(state.steps - first, 0)):
                self._stop_if_asked(state.step)
                if self.world.size > 1 or len(labels) >= state.least(len(labels)):
                    state.tally.add(state.step, *self.train_step(images, labels))
                state.step += 1
                bar.update(1)
                if state.step % self.args.print_freq == 0 and state.step < state.steps:
                    self._report(bar)
            self._stop_if_asked(0)
            score = self._score()
        done = score.images * (state.step - first) / max(state.step, 1)
        return score, done / (time.perf_counter() - began)

    def train_step(self, images, labels):
        """One step of SGD on this rank's images. Returns logits, labels and the sum of losses, for the tally."""
        with self._autocast():
            logits = self.forward(images)
        loss = sum_of_losses(logits.float(), labels)
        self.state.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages over ranks: a rank's part of the mean is its sum of losses times size / batch
        left = len(self.datasets.train) - self.state.step * self.args.batch_size
        batch = len(labels) if self.world.size == 1 else min(self.args.batch_size, left)
        (loss * (self.world.size / batch)).backward()
        self.state.optimizer.step()
        if hasattr(self.network, "after_step"):
            self.network.after_step()
        return logits.detach(), labels, loss.detach()

    def validate(self):
        """The Score on the validation set. Raises DivergedError; StoppedError as `run`."""
        steps = math.ceil(len(self.datasets.val) / self.args.batch_size)
        tally = Tally(steps, self.world.device)
        self.network.eval()
        with torch.no_grad(), self._autocast(), self.log.bar(steps, 0, "validation") as bar:
            for step, (images, labels) in enumerate(self._batches(self.datasets.val, train=False)):
                self._stop_if_asked(step)
                if len(labels):
                    logits = self.forward_alone(images).float()
                    tally.add(step, logits, labels, sum_of_losses(logits, labels))
                bar.update(1)
            self._stop_if_asked(0)
        score, bad = tally.score(steps, self.world)
        if bad:
            self._diverged(f"validation after epoch {self.state.epoch + (self.state.step > 0)}, step {bad} of {steps}")
        return score

    def _batches(self, images, train, start=0):
        args, world, epoch = self.args, self.world, self.state.epoch
        order = {"shuffle": train, "seed": args.seed, "epoch": epoch, "augment": train, "start_step": start}
        place = {"rank": world.rank, "world_size": world.size, "workers": args.workers, "device": world.device}
        batches = images.loader(args.batch_size, **order, **place, bad_images=args.bad_images)
        return batches if world.size > 1 else self.stop.awaited(batches)  # several processes must agree

    def _autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.args.amp else contextlib.nullcontext()

    def _stop_if_asked(self, step):
        """Saves the state, within an epoch if need be, if a signal has come. Raises StoppedError."""
        asked = self.stop.signum is not None
        if self.world.size > 1:
            asked = step % SYNC_EVERY == 0 and self.world.any(asked)
        if not asked:
            return
        self._score()
        checkpoint = self.state.checkpoint()
        if self.log.folder is not None:
            self.log.folder.save_last(checkpoint)
        where = f"stopped in {self._where(self.state.step)}" + "; state saved" * (self.log.folder is not None)
        raise StoppedError(f"{where}; rerun the same command to resume", self.stop.signum or signal.SIGTERM)

    def _where(self, step):
        return f"epoch {self.state.epoch + 1}, step {step} of {self.state.steps}"

    def _score(self):
        """The Score of the epoch so far. Raises DivergedError."""
        score, bad = self.state.tally.score(self.state.step, self.world)
        if bad:
            self._diverged(self._where(bad))
        return score

    def _diverged(self, where):
        kept = f"the last checkpoint is of epoch {self.state.epoch}" if self.state.history.rows else "nothing was saved"
        raise DivergedError(f"{where}: the loss is not a finite number; {kept} (a smaller --lr may help)")

    def _report(self, bar):
        score, state = self._score(), self.state
        bar.set_postfix_str(f"loss {score.loss:.3f} acc1 {score.acc1:.1f}", refresh=False)
        if bar.disable:
            where = f"epoch {state.epoch + 1}/{self.args.epochs}  step {state.step}/{state.steps}"
            self.log.say(f"{where}  loss {score.loss:.4f}  acc1 {score.acc1:.2f}")

    def _record(self, train, val, speed):
        """Writes the results of an epoch; last.pt comes last, so that a kill before it repeats the epoch."""
        state, folder = self.state, self.log.folder
        is_best = state.history.add(state.epoch, state.learning_rate(max(state.epoch - 1, 0)), train, val, speed)
        self.log.say(state.history.line(self.args.epochs))
        if folder is None:
            return
        if is_saved_epoch(state.epoch):
            save(folder.file(state.epoch), state.plain())
        if is_best:
            save(folder.file("best"), state.plain())
        self.log.metrics(state.history.rows)
        folder.save_last(state.checkpoint())
        self._status("running")

    def _status(self, status):
        history = self.state.history
        self.log.status(status, self.state.epoch, self.args.epochs, history.acc1, history.best_acc1)
