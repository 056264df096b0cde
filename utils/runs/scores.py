"""What a network scores: loss and hits of every step, and a row of metrics for every epoch."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from utils.errors import UserError


@dataclass(frozen=True)
class Score:
    """Mean loss (nats), top-1 and top-5 accuracy (%) over `images` images."""

    loss: float
    acc1: float
    acc5: float
    images: int


def sum_of_losses(logits, labels):
    """The sum of the cross-entropies (nats) of logits (B, classes) and labels (B,). Raises UserError for others."""
    is_integer = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not is_integer:
        found = f"scores {tuple(logits.shape)} and {labels.dtype} labels {tuple(labels.shape)}"
        raise UserError(f"{found}: should be (images, classes) and integers (images,)")
    return cross_entropy(logits, labels.long(), reduction="sum")


class Tally:
    """Loss and hits of every step of an epoch, on the device until they are asked for."""

    def __init__(self, steps, device, rows=None):
        self.rows = torch.zeros(steps, 4, device=device)  # sum of losses, top-1 hits, top-5 hits, images
        if rows is not None:
            self.rows = torch.cat([rows.to(device), self.rows[len(rows) :]])

    @torch.no_grad()
    def add(self, step, logits, labels, loss):
        """Adds the step number `step` (from 0): logits (B, classes), labels (B,), sum of losses ()."""
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = (best == labels[:, None]).float()
        self.rows[step, :3] = torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        self.rows[step, 3] = len(labels)

    def score(self, steps, world):
        """The `Score` of the first `steps` steps on all ranks, and the first of them (from 1) whose loss is not finite.

        Collective: every rank must call it. Returns (score, step or None).
        """
        rows = world.sum(self.rows[:steps].clone()).cpu().double()
        total = rows.sum(0)
        images = int(total[3])
        loss, acc1, acc5 = (total[:3] / max(images, 1)).tolist()
        bad = (~rows[:, 0].isfinite()).nonzero().flatten().tolist()
        return Score(loss, 100 * acc1, 100 * acc5, images), bad[0] + 1 if bad else None


class History:
    """The metrics of all epochs so far. `rows`: a dict each, from epoch 0; `best_acc1`: the best validation's (%)."""

    def __init__(self, rows=(), best_acc1=None):
        self.rows, self.best_acc1 = list(rows), best_acc1

    @property
    def acc1(self):
        """Top-1 accuracy (%) of the last validation, None before the first."""
        return self.rows[-1]["val_acc1"] if self.rows else None

    def add(self, epoch, rate, train, val, speed):
        """Adds an epoch: learning rate, Scores (`train` is None before training), images per second.

        Returns whether its validation is the best so far.
        """
        row = {"epoch": epoch, "lr": rate, "images_per_second": speed if train else None}
        for name, score in (("train", train), ("val", val)):
            row.update({f"{name}_{key}": getattr(score, key) if score else None for key in ("loss", "acc1", "acc5")})
        is_best = self.best_acc1 is None or val.acc1 > self.best_acc1
        self.rows.append(row)
        self.best_acc1 = max(val.acc1, self.best_acc1 or 0.0)
        return is_best

    def line(self, epochs):
        """The last epoch of `epochs` in words."""
        row = self.rows[-1]
        train = speed = ""
        if row["train_loss"] is not None:
            train = f"train loss {row['train_loss']:.4f} acc1 {row['train_acc1']:.2f}  "
            speed = f"  lr {row['lr']:g}  {row['images_per_second']:.0f} images/s"
        val = f"val loss {row['val_loss']:.4f} acc1 {row['val_acc1']:.2f} acc5 {row['val_acc5']:.2f}"
        return f"epoch {row['epoch']}/{epochs}  {train}{val} (best {self.best_acc1:.2f}){speed}"
