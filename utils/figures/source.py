"""What the figures are made from: the trained networks of a scale's experiments, their images and accuracies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from models import rainbow_layers
from rainbow import Layer, weight_layers
from rainbow.alignment import MeanNetwork
from utils.data.datasets import Datasets, load_datasets
from utils.errors import UserError
from utils.experiments.registry import Experiment, figure_sets
from utils.experiments.status import read_state
from utils.runs.folder import RunFolder
from utils.runs.networks import load_network
from utils.runs.options import TRAINING
from utils.runs.samples import rainbow_accuracies, read_rows


class Batches:
    """An iterable for many passes, with a progress bar in each if stderr is a terminal."""

    def __init__(self, make: Callable[[], Iterable], count: int, text: str, quiet: bool = False):
        self._make, self._count, self._text, self._quiet = make, count, text, quiet

    def __len__(self):
        return self._count

    def __iter__(self):
        batches = itertools.islice(self._make(), self._count)
        disable = True if self._quiet else None  # None: unless stderr is a terminal
        return iter(tqdm(batches, desc=f"  {self._text}", total=self._count, leave=False, disable=disable))


class Source:
    """The networks, images and accuracies left by the experiments of a scale in the folder `checkpoints`.

    places: folders of data sets that have moved since training, {"data": ..., "data_dir": ...}. batch: images at a
    time. Methods raise UserError if a run is missing or its files are damaged.
    """

    def __init__(self, scale: str, checkpoints="checkpoints", *, device, places=None, batch=128, quiet=False):
        rainbow_layers.register()
        self.scale, self.root, self.device = scale, Path(checkpoints), device
        self.places, self.batch, self.quiet = places or {}, batch, quiet
        self._data: dict[tuple, Datasets] = {}
        self._means: dict[tuple, MeanNetwork] = {}

    def sets(self, figure: int) -> dict[str, list[Experiment]]:
        """The experiments of a figure, by their part in it."""
        return figure_sets(self.scale, figure)

    def experiments(self, figure: int) -> list[Experiment]:
        """The experiments of a figure."""
        return [experiment for members in self.sets(figure).values() for experiment in members]

    def require(self, figure: int) -> None:
        """Raises UserError, with the command that runs them, if experiments of a figure are not finished."""
        wanted = self.experiments(figure)
        missing = [experiment.name for experiment in wanted if read_state(self.root, experiment).name != "finished"]
        if missing:
            command = f"python run_exps.py --scale {self.scale} --figure {figure}"
            command += "" if self.root == Path("checkpoints") else f" --checkpoints {self.root}"
            names = "".join(f"\n  {name}" for name in missing[:5]) + ("\n  ..." if len(missing) > 5 else "")
            raise UserError(
                f"figure {figure}: {len(missing)} of its {len(wanted)} experiments are not finished in "
                f"{self.root}; run them with: {command}{names}"
            )

    def files(self, figure: int) -> list[Path]:
        """The checkpoint files that the numbers of a figure depend on."""
        return [self.root / experiment.name / experiment.output for experiment in self.experiments(figure)]

    def network(self, experiment: Experiment, epoch: int | None = None) -> nn.Module:
        """The network of an experiment at an epoch, or at the end, on the device."""
        return load_network(RunFolder(self.root, experiment.name), epoch, self.device).network

    def networks(self, members: Sequence[Experiment]) -> list[nn.Module]:
        """The networks of several experiments, at the end."""
        return [self.network(member) for member in Batches(lambda: members, len(members), "networks", self.quiet)]

    def epochs(self, experiment: Experiment) -> list[int]:
        """The epochs whose checkpoints were kept, increasing."""
        return RunFolder(self.root, experiment.name).epochs()

    def train(self, experiment: Experiment, limit: int | None = None) -> Batches:
        """The training images, not augmented, or about `limit` of them: the same ones each time."""
        images = self._datasets(experiment).train
        few = limit is not None and limit < len(images)
        return self._batches(experiment, images, "training images", limit if few else len(images), shuffle=few)

    def test(self, experiment: Experiment) -> Batches:
        """The test images."""
        images = self._datasets(experiment).val
        return self._batches(experiment, images, "test images", len(images))

    def layers(self, experiment: Experiment, network: nn.Module) -> list[Layer]:
        """The weight layers W_1, ..., W_{J+1} of a network, without the projections of shortcuts."""
        signal = self._datasets(experiment).signal
        example = torch.rand(2, signal.channels, signal.height, signal.width)
        return [layer for layer in weight_layers(network, example) if "downsample" not in layer.name]

    def mean_network(self, members: Sequence[Experiment], layers: Sequence[int]) -> MeanNetwork:
        """The mean network of a set at its weight layers j; kept for the next figure."""
        key = tuple(member.name for member in members), tuple(layers)
        if key not in self._means:
            networks = self.networks(members)
            names = [layer.name for layer in self.layers(members[0], networks[0])]
            chosen, images = [names[j - 1] for j in layers], self.train(members[0])
            self._means[key] = MeanNetwork.fit(networks, images, device=self.device, layers=chosen)
        return self._means[key]

    def accuracy(self, experiment: Experiment, top: int = 1) -> float:
        """Top-1 or top-5 test accuracy in percent after training."""
        state = read_state(self.root, experiment)
        accuracy = state.acc1 if top == 1 else state.acc5
        if accuracy is None:
            raise UserError(f"{self.root / experiment.name}: no top-{top} accuracy in its status.json or metrics.csv")
        return float(accuracy)

    def sampled_accuracies(self, experiment: Experiment) -> np.ndarray:
        """Top-1 test accuracy in percent of every rainbow network sampled. # (repeats,)"""
        folder = self.root / experiment.name
        accuracies = rainbow_accuracies(read_rows(folder))
        if not accuracies:
            raise UserError(f"{folder}: no accuracies of samples; run resample.py")
        return np.array(accuracies)

    def _batches(self, experiment, images, text, count, **options):
        options.update(workers=self._args(experiment).workers, device=self.device)
        return Batches(lambda: images.loader(self.batch, **options), -(-count // self.batch), text, self.quiet)

    def _args(self, experiment):
        args = RunFolder(self.root, experiment.name).args()
        return replace(args, **{name: value for name, value in self.places.items() if value is not None})

    def _datasets(self, experiment):
        args = self._args(experiment)
        key = tuple(str(getattr(args, option.field)) for option in TRAINING.options if option.group.title == "data")
        if key not in self._data:
            self._data[key] = load_datasets(args)
        return self._data[key]
