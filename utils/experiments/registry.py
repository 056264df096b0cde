"""Every experiment of the paper, once: what the runner trains, the figures draw and the tests read.

An experiment is data made by a function: a network, a data set and a recipe (`utils.experiments.networks`) give the
command, the name and the cost; the groups below are lists of variants. Nothing here imports torch, so that listing the
experiments takes no time. Guth, Ménard, Rochette, Mallat, "A Rainbow in Deep Network Black Boxes", JMLR 25 (2024):
sections and figures are the paper's.

    for experiment in experiments("laptop"):
        print(experiment.name, experiment.command())
    figure_sets("paper", 3)["trained"]     # the networks of figure 3, narrowest first
"""

import dataclasses
import functools
import hashlib
import operator
from types import SimpleNamespace

from utils.experiments.networks import (
    CIFAR10,
    DIGITS,
    DIGITS32,
    FASHION_MNIST,
    IMAGENET,
    IMAGENET1K,
    Recipe,
    ResNet,
    Scattering,
)
from utils.experiments.published import load_published

TRIAL_FLAGS = ("--epochs", "--data-subset", "--batch-size", "--lr")
RESAMPLING_PASSES = 6  # over the training images, to sample a network
KERNELS = 3  # networks of figure 10


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of a script, and why it is made.

    name: its folder under the checkpoints. script, arguments: what is run, without --seed and --dir.
    kind: "trained", "resampled", "retrained" (last projection and classifier of a resampled network) or "white".
    serves: pairs (figure, set in that figure). width: scaling of all widths. init: number among its equals.
    needs: names of the experiments that must be finished before. published: {"acc1" or "acc5": percent, "source"}.
    epochs, images, steps: of training (or samples), per epoch, in all. cost: real multiply-adds, all of the run.
    output: the file without which the run is not finished. ours: not in the paper.
    """

    name: str
    script: str
    arguments: tuple
    scale: str
    group: str
    serves: tuple
    seed: int
    cost: int
    epochs: int
    images: int
    steps: int
    kind: str = "trained"
    width: float = 1
    init: int = 1
    needs: tuple = ()
    published: dict | None = dataclasses.field(default=None, compare=False)
    output: str = "last.pt"
    ours: bool = False

    @property
    def figures(self):
        """Numbers of the figures that this experiment serves."""
        return tuple(sorted({figure for figure, _ in self.serves}))

    @property
    def uses_imagenet(self):
        return IMAGENET in self.arguments

    def command(self, python="python", data=None, extra=()):
        """The command line as a list. `data`: ImageNet's folder, a placeholder if None; `extra`: more flags."""
        arguments = [data if data and argument == IMAGENET else argument for argument in self.arguments]
        return [python, self.script, *arguments, "--seed", str(self.seed), "--dir", self.name, *extra]


# --- The scales --------------------------------------------------------------------------------------------------

# How they differ: data, schedules, widths (exponents of 2) and networks per set. `deep`, `shallow` and `large` are the
# networks of width 1; `large_by` and `resnets_by` say how networks are trained if not by `recipe`. `inits`: networks of
# a figure that has one network of a kind in the paper; claims are checked on each. `resampling_skip`: figure 3 has the
# skip network (as in the paper; on the digits even its white features are nearly perfect), not a network of figures 4
# and 5. `resampling_shown`: the widths it draws. `repeats`: rainbow networks per trained one (None: the script's own).
PAPER = SimpleNamespace(
    name="paper",
    data=CIFAR10,
    recipe=Recipe(150, 50, 0.01, 128, 2),
    deep=Scattering((64, 128, 256, 512, 512, 512, 512, 512)),
    shallow=Scattering((64, 128, 256, 512), norm=False, factorize=None, decay=False),
    large_by={"data": IMAGENET1K, "recipe": Recipe(150, 50, 0.01, 128, 10)},
    large=Scattering((32, 64, 64, 128, 256, 512, 512, 512, 512, 512, 256), True, False, "Pc", 1, False),
    resnets_by={"data": IMAGENET1K, "recipe": Recipe(90, 30, 0.1, 256, 10), "prefix": "standard", "suffix": "-fix"},
    resnet_widths=range(-3, 4),
    resnet_shown=0,
    gaussianity=50,
    inits=1,
    resampling_widths=range(-3, 4),
    resampling_shown=range(-3, 3),
    resampling_skip=True,
    repeats=None,
    activation_widths=range(-3, 4),
    weight_widths=range(-3, 6),
    weight_inits=10,
    many=50,
)

LAPTOP = SimpleNamespace(
    name="laptop",
    data=DIGITS,
    recipe=Recipe(15, 5, 0.05, 32),
    deep=Scattering((16, 32, 64, 64)),
    shallow=Scattering((16, 32, 64, 64), norm=False, decay=False),
    large_by={"data": DIGITS32, "recipe": Recipe(15, 5, 0.05, 32)},
    large=Scattering((8, 16, 16, 32, 32, 64), True, False, "Pc", 1, False),
    resnets_by={"data": DIGITS32, "recipe": Recipe(15, 5, 0.05, 32)},
    resnet_widths=range(-4, 0),
    resnet_shown=-1,
    gaussianity=20,
    inits=3,
    resampling_widths=range(-3, 3),
    resampling_shown=range(-3, 3),
    resampling_skip=False,
    repeats=3,
    activation_widths=range(-3, 3),
    weight_widths=range(-3, 3),
    weight_inits=3,
    many=20,
)

# As much of the paper's CIFAR-10 as one GPU trains overnight, at the paper's widths; ImageNet's place is taken by it.
CIFAR = SimpleNamespace(
    **vars(PAPER)
    | {
        "name": "cifar",
        "large_by": {},
        "large": Scattering((32, 64, 64, 128, 256, 256, 256, 256), True, False, "Pc", 1, False),
        "resnets_by": {"recipe": Recipe(90, 30, 0.1, 256, 2)},
        "resnet_widths": range(-3, 2),
        "gaussianity": 20,
        "resampling_widths": range(-3, 2),
        "resampling_shown": range(-3, 2),
        "activation_widths": range(-3, 3),
        "weight_widths": range(-3, 4),
        "weight_inits": 3,
        "many": 20,
    }
)

# Real images on two cores: a third of Fashion-MNIST. Four blocks, not factorised, halve the images' sides each.
FASHION = SimpleNamespace(
    **vars(LAPTOP)
    | {
        "name": "fashion",
        "data": FASHION_MNIST,
        "recipe": Recipe(10, 4, 0.05, 128),
        "deep": Scattering((8, 16, 32, 64), factorize=None),
        "shallow": Scattering((8, 16, 32, 64), norm=False, factorize=None, decay=False),
        "large_by": {},
        "large": Scattering((8, 16, 16, 32, 32, 64), True, False, "Pc", 1, False),
        "resnets_by": {},
        "resnet_widths": range(-5, -1),
        "resnet_shown": -2,
        "resampling_widths": range(-2, 3),
        "resampling_shown": range(-2, 3),
        "activation_widths": range(-2, 3),
        "weight_widths": range(-2, 3),
    }
)

_SCALES = {scale.name: scale for scale in (PAPER, CIFAR, LAPTOP, FASHION)}
SCALES = tuple(_SCALES)
SMALL = (LAPTOP.name, FASHION.name)  # scales that two CPU cores train


# --- Experiments and their variants ------------------------------------------------------------------------------


def seed_of(name):
    """The seed of the experiment called `name`: a fixed number in [0, 2^31), different for every name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def train(scale, network, group, serves, data=None, recipe=None, prefix=None, suffix="", more=(), passes=3, **fields):
    """The experiment that trains `network`, by default on the scale's data by its recipe.

    serves: {figure: set}. passes: forward passes that a step costs. more: further arguments.
    """
    data, recipe = data or scale.data, recipe or scale.recipe
    name = f"{prefix or data.label}-{network.label}{suffix}"
    return Experiment(
        name=name,
        script="main_block.py",
        scale=scale.name,
        group=group,
        serves=tuple(serves.items()),
        arguments=recipe.arguments + data.arguments + network.arguments + tuple(more),
        seed=seed_of(name),
        cost=recipe.epochs * (passes * data.train + data.val) * network.multiply_adds(data),
        epochs=recipe.epochs,
        images=data.train,
        steps=recipe.epochs * -(-data.train // recipe.batch),
        **fields,
    )


def train_classifier(scale, network, group, serves, more=(), **fields):
    """The experiment that trains only the classifier of `network`, of which the last projection is a part (section 4);
    the other projections stay as they begin."""
    frozen = ("--freeze-P", *["1"] * (len(network.sizes) - 1))
    return train(scale, network, group, serves, more=frozen + tuple(more), passes=1, **fields)


def resample(scale, trained, network, serves, **fields):
    """The experiment that samples rainbow networks of `trained` (paper, section 4). serves: {figure: set}."""
    name, repeats = f"resamplings/resample-{trained.name}", scale.repeats or 1
    more = () if scale.repeats is None else ("--num-repeats", str(repeats))
    return dataclasses.replace(
        trained,
        name=name,
        script="resample.py",
        serves=tuple(serves.items()),
        arguments=("--experiment", trained.name, *more),
        seed=seed_of(name),
        kind="resampled",
        needs=(trained.name,),
        output="checkpoint_repeat0.pt",
        epochs=repeats,
        cost=RESAMPLING_PASSES * repeats * scale.data.train * network.multiply_adds(scale.data),
        steps=RESAMPLING_PASSES * repeats * -(-scale.data.train // 128),
        **fields,
    )


def renamed(experiment, rename):
    """The same experiment in another folder, needs and the files it reads included; `rename`: name -> name."""

    def moved(argument):
        for need in experiment.needs:
            if argument == need or argument.startswith(f"{need}/"):
                return rename(need) + argument[len(need) :]
        return argument

    return dataclasses.replace(
        experiment,
        name=rename(experiment.name),
        needs=tuple(map(rename, experiment.needs)),
        arguments=tuple(map(moved, experiment.arguments)),
    )


def with_init(experiment, init):
    """The experiment as task number `init` of a cluster's array runs it: named NAME-initN, with its own seed."""
    other = renamed(experiment, lambda name: f"{name}-init{init}")
    return dataclasses.replace(other, seed=seed_of(other.name), init=init)


def trial(experiment, overrides):
    """The experiment with other training flags ({"--epochs": "1"}), in the folder trial-FLAGS/NAME."""
    label = "-".join(["trial"] + [flag.strip("-") + value.replace(":", "_") for flag, value in overrides.items()])
    other = renamed(experiment, lambda name: f"{label}/{name}")
    if other.script != "main_block.py":
        return other
    arguments = list(other.arguments)
    for flag, value in overrides.items():
        place = arguments.index(flag) if flag in arguments else len(arguments)
        arguments[place : place + 2] = flag, value
    epochs = int(overrides.get("--epochs", other.epochs))
    cost, steps = (int(amount * (epochs / other.epochs)) for amount in (other.cost, other.steps))
    return dataclasses.replace(other, arguments=tuple(arguments), epochs=epochs, cost=cost, steps=steps)


# --- Published numbers -------------------------------------------------------------------------------------------


def _published(scale, figure, name, *place, accuracy="acc1"):
    """{"acc1" or "acc5": percent, "source": figure of the paper}: the number `name` at `place` published with a figure.

    None at scales other than the paper's.
    """
    if scale is not PAPER:
        return None
    numbers = load_published()[figure]
    return {accuracy: functools.reduce(operator.getitem, place, numbers[name]), "source": numbers["source"]}


def _published_by_width(scale, name, width):
    """What `_published` gives of figure 3 for a width, None for widths that were not published."""
    widths = load_published()["resampling_width"]["widths"] if scale is PAPER else []
    return _published(scale, "resampling_width", name, widths.index(width)) if width in widths else None


# --- The groups, the same at every scale -------------------------------------------------------------------------


def gaussianity(scale):
    """Many networks of one width (figures 1, 2, 8): are their weights Gaussian once aligned and whitened? The first of
    them are sampled for figure 10, which is ours."""
    published = _published(scale, "clipping", "accuracy_weight_4", -1)

    def one(init):
        serves = dict.fromkeys((1, 2, 8, 10) if init <= KERNELS else (1, 2, 8), "networks")
        suffix = f"-gaussiantest-init{init}"
        return train(scale, scale.deep, "gaussianity", serves, suffix=suffix, init=init, published=published)

    return [one(init) for init in range(1, scale.gaussianity + 1)]


def resampling(scale):
    """Trained networks of every width, rainbow networks sampled from them, and those with their classifier trained
    (figure 3). Ours: white random features, the same network with its first weights frozen, classifier trained."""
    rows = []
    for exponent in scale.resampling_widths:
        network, width = dataclasses.replace(scale.deep.scaled(exponent), skip=scale.resampling_skip), 2.0**exponent
        serves = {3: "trained"} if exponent in scale.resampling_shown else {}
        serves |= {} if scale.resampling_skip else {4: "widths", 5: "scattering"}
        published = _published_by_width(scale, "trained", width)
        trained = train(scale, network, "resampling", serves, width=width, published=published)
        rows.append((trained, *_rainbow(scale, network, trained)))
    return [experiment for row in zip(*rows) for experiment in row]


def _rainbow(scale, network, trained, suffix=""):
    """Rainbow networks of a trained one, the first of them with its classifier trained, and white random features."""

    def fields(part, published=None):
        serves = {3: part} if 3 in trained.figures else {}
        return {"serves": serves, "published": published and _published_by_width(scale, published, trained.width)}

    shared, group = {"width": trained.width, "init": trained.init}, "resampling"
    sampled = resample(scale, trained, network, group=group, **fields("rainbow", "rainbow"))
    start = {"more": ("--resume", f"{sampled.name}/{sampled.output}", "--restart"), "needs": (sampled.name,), **shared}
    start |= {"suffix": f"{suffix}-load-gaussian-retrainclf", "kind": "retrained", **fields("retrained", "retrained")}
    white = {"suffix": f"{suffix}-white-trainclf", "kind": "white", "ours": True, **shared, **fields("white")}
    retrained = train_classifier(scale, network, group, **start)
    return sampled, retrained, train_classifier(scale, network, f"{group}_baseline", **white)


def activation_convergence(scale):
    """Scattering networks and ResNets of every width (figures 4, 5, 7): do activations converge with width?"""
    group = "activation_convergence"
    inits = range(1) if scale.resampling_skip else range(1, scale.inits)  # else the first are those of figure 3
    experiments = [_scattering(scale, exponent, init) for exponent in scale.activation_widths for init in inits]
    for exponent in scale.resnet_widths:
        shown = exponent == scale.resnet_shown
        serves = {5: "resnet", 7: "resnet"} if shown else {5: "resnet"}
        published = _published(scale, "imagenet_spectra", "resnet_acc5", accuracy="acc5") if shown else None
        for init in range(1, scale.inits + 1):
            fields = {"width": 2.0**exponent, "published": published, "init": init, **scale.resnets_by}
            fields["suffix"] = fields.get("suffix", "") + _again(init)
            experiments.append(train(scale, ResNet(2.0**exponent), group, serves, **fields))
    return experiments


def _scattering(scale, exponent, init):
    """A scattering network of figures 4 and 5; of figure 3 too unless it is the only one."""
    serves = {4: "widths", 5: "scattering"} | ({3: "trained"} if init else {})
    fields = {"width": 2.0**exponent, "init": init + 1, "suffix": f"-init{init}" if init else ""}
    return train(scale, scale.deep.scaled(exponent), "activation_convergence", serves, **fields)


def resampling_again(scale):
    """Rainbow networks of the further networks of figure 3, where a scale has several."""
    inits = () if scale.resampling_skip else range(1, scale.inits)
    pairs = [(exponent, init) for exponent in scale.activation_widths for init in inits]
    rows = [
        _rainbow(scale, scale.deep.scaled(exponent), _scattering(scale, exponent, init), f"-init{init}")
        for exponent, init in pairs
    ]
    return [experiment for row in zip(*rows) for experiment in row]


def _again(init):
    """The end of the name of a network of which the paper has one."""
    return "" if init == 1 else f"-init{init}"


def weight_convergence(scale):
    """Four-block networks of every width, a few of each, and many of width 1 (figure 6): do covariances converge?"""

    def variant(network, suffix, init, part, **fields):
        fields |= {"suffix": f"-paperexps{suffix}-init{init}", "init": init}
        return train(scale, network, "weight_convergence", {6: part}, **fields)

    widths = [
        variant(scale.shallow.scaled(exponent, last=False), "-scalewidth", init, "widths", width=2.0**exponent)
        for exponent in scale.weight_widths
        for init in range(1, scale.weight_inits + 1)
    ]
    published = _published(scale, "covariance_convergence", "clip_accuracies", 0, -1)
    inits = range(1, scale.many + 1)
    return widths + [variant(scale.shallow, "", init, "many", published=published) for init in inits]


def imagenet_spectra(scale):
    """The complex skip network (figure 7); the ResNet beside it is one of `activation_convergence`."""
    fields = {"published": _published(scale, "imagenet_spectra", "scattering_acc5", accuracy="acc5"), **scale.large_by}
    return [
        train(scale, scale.large, "imagenet_spectra", {7: "scattering"}, suffix=_again(init), init=init, **fields)
        for init in range(1, scale.inits + 1)
    ]


def dynamics(scale):
    """A network whose first epochs are kept (figure 9): training amplifies the weights where Ĉ is large."""
    network = dataclasses.replace(scale.deep, norm=False, decay=False)
    return [
        train(scale, network, "dynamics", {9: "network"}, suffix=_again(init), init=init)
        for init in range(1, scale.inits + 1)
    ]


# --- The registry ------------------------------------------------------------------------------------------------


@functools.cache
def experiments(scale="paper"):
    """All experiments of one of SCALES, as a tuple in the order in which they are listed and run."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: not known; {', '.join(SCALES)}")
    chosen = _SCALES[scale]
    groups = (gaussianity, resampling, activation_convergence, weight_convergence, imagenet_spectra, dynamics)
    return tuple(experiment for group in (*groups, resampling_again) for experiment in group(chosen))


def by_name(scale="paper"):
    """{name: experiment} of a scale."""
    return {experiment.name: experiment for experiment in experiments(scale)}


def groups(scale="paper"):
    """Names of the groups, in order."""
    return list(dict.fromkeys(experiment.group for experiment in experiments(scale)))


def figures(scale="paper"):
    """Numbers of the figures that experiments serve, in order."""
    return sorted({figure for experiment in experiments(scale) for figure in experiment.figures})


def figure_sets(scale, figure):
    """{set: experiments} of a figure, each set narrowest first, then by number of initialisation.

    1, 2, 8, 10: networks. 3: trained, rainbow, retrained, white. 4: widths. 5: scattering, resnet. 6: widths, many.
    7: scattering, resnet. 9: network.
    """
    sets = {}
    for experiment in experiments(scale):
        for number, name in experiment.serves:
            if number == figure:
                sets.setdefault(name, []).append(experiment)
    if not sets:
        raise ValueError(f"figure {figure!r}: no experiment serves it; one of {figures(scale)}")
    return {name: sorted(members, key=lambda e: (e.width, e.init)) for name, members in sets.items()}
