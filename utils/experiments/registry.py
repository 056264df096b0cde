"""Every experiment of the paper, once: what the runner trains, the figures draw and the tests read.

An experiment is data made by a function: a network (`Scattering`, `ResNet`), a data set (`Data`) and a recipe
(`Recipe`) give the command, the name and the cost; the groups below are lists of variants. Nothing here imports
torch, so that listing the experiments takes no time. Guth, Ménard, Rochette, Mallat, "A Rainbow in Deep Network
Black Boxes", JMLR 25 (2024): sections and figures are the paper's.

    for experiment in experiments("laptop"):
        print(experiment.name, experiment.command())
    figure_sets("paper", 3)["trained"]     # the networks of figure 3, narrowest first
"""

import dataclasses
import functools
import hashlib
import operator
import shlex

from models.signal import output_size
from utils.experiments.published import load_published

IMAGENET = "PATH/TO/IMAGENET"
SCALES = ("paper", "laptop")
ANGLES = 4
TRIAL_FLAGS = ("--epochs", "--data-subset", "--batch-size", "--lr")


# --- What is trained, on what, and how ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set as the command line names it, and the shape of what it holds."""

    label: str
    arguments: tuple
    channels: int
    size: int
    classes: int
    train: int
    val: int


CIFAR10 = Data("cifar", ("--cifar10",), 3, 32, 10, 50_000, 10_000)
IMAGENET1K = Data("imagenet", ("--data", IMAGENET), 3, 224, 1000, 1_281_167, 50_000)
DIGITS = Data("digits", ("--digits",), 1, 8, 10, 1297, 500)
DIGITS32 = Data("digits32", ("--digits", "--resize-images", "32"), 1, 32, 10, 1297, 500)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum 0.9 whose rate is divided by 10 every `drop` epochs."""

    epochs: int
    drop: int
    lr: float
    batch: int
    workers: int | None = None

    @property
    def arguments(self):
        workers = () if self.workers is None else ("-j", str(self.workers))
        return (
            "-p",
            "1000",
            "--epochs",
            str(self.epochs),
            "--learning-rate-adjust-frequency",
            str(self.drop),
            "--lr",
            str(self.lr),
            *workers,
            "--batch-size",
            str(self.batch),
        )


@dataclasses.dataclass(frozen=True)
class Scattering:
    """A learned scattering network (paper, section 5): per block a wavelet transform, then a learned projection.

    `sizes`: channels after each block. `skip`: 'rho', z -> [z, |z|], in place of the modulus of psi. `norm`: 'N'.
    `kind`: the projection's weights, "Pr" real or "Pc" complex. `factorize`: blocks from this one on are factorised
    (None: no block is). `plain_classifier`: batch norm without affine part and no bias. `decay`: the weight decay.
    """

    sizes: tuple
    skip: bool = False
    norm: bool = True
    kind: str = "Pr"
    factorize: int | None = 0
    plain_classifier: bool = True
    decay: bool = True

    @property
    def label(self):
        """The part of an experiment's name that says what the network is, as the authors write it."""
        letters = self.kind.replace("Pr", "WP").replace("Pc", "WPc")
        parts = ["".join(f"{letters}{size}" for size in self.sizes)]
        parts += ["skip"] * self.skip + ["norm"] * self.norm + [f"L{ANGLES}"]
        parts += ["clbnstd-clnobias"] * self.plain_classifier + ["nowd"] * (not self.decay)
        return "-".join(parts)

    @property
    def arguments(self):
        blocks = len(self.sizes)
        modules = ["Fw"] + ["rho"] * self.skip + ["Std", self.kind] + ["N"] * self.norm
        arguments = ["-a", " ".join(modules)]
        arguments += [] if self.skip else ["--psi-arch", "mod"]
        arguments += [f"--{self.kind}-size", *map(str, self.sizes)]
        arguments += [] if self.factorize is None else ["--factorize-filters", str(self.factorize)]
        arguments += ["--n-blocks", str(blocks)]
        arguments += ["--scattering-wph", *["1"] * blocks, "--scat-angles", *[str(ANGLES)] * blocks]
        arguments += ["--classifier-batch-norm", "std", "--no-classifier-bias"] if self.plain_classifier else []
        return tuple(arguments + ([] if self.decay else ["--weight-decay", "0"]))

    def image_sizes(self, size):
        """Height of the image after each block."""
        sizes = []
        for block in range(len(self.sizes)):
            plain = self.factorize is None or block < self.factorize
            size = output_size(size, subsample=bool(plain or (block - self.factorize) % 2))
            sizes.append(size)
        return sizes

    def multiply_adds(self, data):
        """Real multiply-adds of the projections and the classifier in one forward pass of one image.

        The wavelet transform is left out: its share falls as the network widens. Of the inputs [z, |z|] of a skip
        network the first half is complex and the second real, so real weights cost 3/2 per entry, complex ones 3.
        """
        per_weight = {(False, "Pr"): 2, (True, "Pr"): 3, (True, "Pc"): 6}[self.skip, self.kind]
        images = self.image_sizes(data.size)
        inputs = [(1 + self.skip) * (1 + ANGLES) * c for c in (data.channels, *self.sizes[:-1])]
        total = sum(c * d * m * m for c, d, m in zip(self.sizes, inputs, images)) * per_weight // 2
        return total + data.classes * self.sizes[-1] * (1 + self.skip) * images[-1] ** 2


@dataclasses.dataclass(frozen=True)
class ResNet:
    """torchvision's ResNet-18 with every width scaled; batch norm after the non-linearity, no biases."""

    width: float

    @property
    def label(self):
        return f"resnet18-nobias-clnobias-bnpost-widthX{self.width:g}"

    @property
    def arguments(self):
        return (
            "--arch",
            "resnet18-custom",
            "--standard-no-bias",
            "--standard-classifier-no-bias",
            "--standard-batch-norm",
            "post",
            "--standard-width-scaling",
            f"{self.width:g}",
        )

    def multiply_adds(self, data):
        """Real multiply-adds of the convolutions and the classifier in one forward pass of one image."""
        widths = [int(self.width * w) for w in (64, 128, 256, 512)]
        size = -(-data.size // 2)
        total = 7 * 7 * data.channels * widths[0] * size**2
        size, before = -(-size // 2), widths[0]
        for stage, width in enumerate(widths):
            size = size if stage == 0 else -(-size // 2)
            shortcut = 0 if stage == 0 else before * width
            total += (9 * (before * width + 3 * width * width) + shortcut) * size**2
            before = width
        return total + data.classes * before


# --- The record --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of a script, and why it is made.

    name: its folder under the checkpoints. script, arguments: what is run, without --seed and --dir.
    kind: "trained", "resampled", "retrained" (the classifier of a resampled network) or "white".
    serves: pairs (figure, set in that figure). width: scaling of all widths. init: number among its equals.
    needs: names of the experiments that must be finished before. published: {"acc1" or "acc5": percent, "source"}.
    epochs, images, steps: of training, per epoch, in all. cost: real multiply-adds, all of the run.
    output: the file without which the run is not finished. ours: not in the paper.
    """

    name: str
    script: str
    arguments: tuple
    scale: str
    group: str
    kind: str
    serves: tuple
    seed: int
    cost: int
    epochs: int
    images: int
    steps: int
    width: float = 1
    init: int = 1
    needs: tuple = ()
    published: dict | None = dataclasses.field(default=None, compare=False)
    output: str = "last.pt"
    ours: bool = False

    @property
    def figures(self):
        """Numbers of the paper's figures that this experiment serves."""
        return tuple(sorted({figure for figure, _ in self.serves}))

    @property
    def uses_imagenet(self):
        return IMAGENET in self.arguments

    def command(self, python="python", data=None, extra=()):
        """The command line as a list. `data`: ImageNet's folder, a placeholder where None; `extra`: more flags."""
        arguments = [data if data and argument == IMAGENET else argument for argument in self.arguments]
        return [python, self.script, *arguments, "--seed", str(self.seed), "--dir", self.name, *extra]


def seed_of(name):
    """The seed of the experiment called `name`: a fixed number in [0, 2^31), different for every name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def train(network, data, recipe, *, scale, group, serves, suffix="", frozen=False, prefix=None, more=(), **fields):
    """The experiment that trains `network` on `data`; `frozen`: all of it but the classifier stays as it begins."""
    name = f"{prefix or data.label}-{network.label}{suffix}"
    forward = network.multiply_adds(data)
    passes = recipe.epochs * ((1 if frozen else 3) * data.train + data.val)
    freeze = ("--freeze-P", *["1"] * len(network.sizes)) if frozen else ()
    return Experiment(
        name=name,
        script="main_block.py",
        scale=scale,
        group=group,
        serves=tuple(serves),
        arguments=recipe.arguments + data.arguments + network.arguments + freeze + tuple(more),
        seed=seed_of(name),
        cost=passes * forward,
        epochs=recipe.epochs,
        images=data.train,
        steps=recipe.epochs * -(-data.train // recipe.batch),
        **{"kind": "trained", **fields},
    )


RESAMPLING_PASSES = 6


def resample(trained, network, data, repeats=None, **fields):
    """The experiment that samples rainbow networks of `trained` (paper, section 4)."""
    name = f"resamplings/resample-{trained.name}"
    more = () if repeats is None else ("--num-repeats", str(repeats))
    passes = RESAMPLING_PASSES * (repeats or 1) * data.train
    return dataclasses.replace(
        trained,
        name=name,
        script="resample.py",
        arguments=("--experiment", trained.name, *more),
        seed=seed_of(name),
        kind="resampled",
        needs=(trained.name,),
        output="checkpoint_repeat0.pt",
        epochs=1,
        cost=passes * network.multiply_adds(data),
        steps=RESAMPLING_PASSES * (repeats or 1) * -(-data.train // 128),
        **fields,
    )


def retrain(resampled, network, data, recipe, **fields):
    """The experiment that trains the classifier of a resampled network anew: "rainbow + trained classifier"."""
    return train(
        network,
        data,
        recipe,
        frozen=True,
        suffix="-load-gaussian-retrainclf",
        kind="retrained",
        more=("--resume", f"{resampled.name}/checkpoint_repeat0.pt", "--restart"),
        needs=(resampled.name,),
        **fields,
    )


def scaled(sizes, exponent):
    """`sizes` times 2^exponent, as a tuple of integers."""
    return tuple(int(size * 2.0**exponent) for size in sizes)


# --- The groups, the same at every scale -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale:
    """What differs between the scales: data, schedules, widths, and networks per set.

    Widths are exponents of 2. `deep`, `shallow`: channels of the blocks of width 1; in `shallow` only those before
    the last are scaled. `resampling_skip`: figure 3 has the skip network (as in the paper; on the digits even its
    white features are nearly perfect). `repeats`: rainbow networks sampled of a trained one (None: the script's own).
    """

    name: str
    data: Data
    recipe: Recipe
    deep: tuple
    shallow: tuple
    shallow_factorize: int | None
    large_data: Data
    large_recipe: Recipe
    large: Scattering
    resnet_recipe: Recipe
    resnet_prefix: str
    resnet_suffix: str
    resnet_widths: range
    resnet_shown: int
    gaussianity: int
    resampling_widths: range
    resampling_skip: bool
    repeats: int | None
    activation_widths: range
    activation_inits: int
    weight_widths: range
    weight_inits: int
    many: int


PAPER = Scale(
    name="paper",
    data=CIFAR10,
    recipe=Recipe(150, 50, 0.01, 128, 2),
    deep=(64, 128, 256, 512, 512, 512, 512, 512),
    shallow=(64, 128, 256, 512),
    shallow_factorize=None,
    large_data=IMAGENET1K,
    large_recipe=Recipe(150, 50, 0.01, 128, 10),
    large=Scattering(
        (32, 64, 64, 128, 256, 512, 512, 512, 512, 512, 256),
        skip=True,
        norm=False,
        kind="Pc",
        factorize=1,
        plain_classifier=False,
    ),
    resnet_recipe=Recipe(90, 30, 0.1, 256, 10),
    resnet_prefix="standard",
    resnet_suffix="-fix",
    resnet_widths=range(-3, 4),
    resnet_shown=0,
    gaussianity=50,
    resampling_widths=range(-3, 4),
    resampling_skip=True,
    repeats=None,
    activation_widths=range(-3, 4),
    activation_inits=1,
    weight_widths=range(-3, 6),
    weight_inits=10,
    many=50,
)

LAPTOP = Scale(
    name="laptop",
    data=DIGITS,
    recipe=Recipe(15, 5, 0.05, 32),
    deep=(16, 32, 64, 64),
    shallow=(16, 32, 64, 64),
    shallow_factorize=0,
    large_data=DIGITS32,
    large_recipe=Recipe(15, 5, 0.05, 32),
    large=Scattering((8, 16, 16, 32, 32, 64), skip=True, norm=False, kind="Pc", factorize=1, plain_classifier=False),
    resnet_recipe=Recipe(15, 5, 0.05, 32),
    resnet_prefix="digits32",
    resnet_suffix="",
    resnet_widths=range(-4, 0),
    resnet_shown=-1,
    gaussianity=20,
    resampling_widths=range(-3, 3),
    resampling_skip=False,
    repeats=3,
    activation_widths=range(-3, 3),
    activation_inits=2,
    weight_widths=range(-3, 3),
    weight_inits=3,
    many=20,
)


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


def gaussianity(scale):
    """Many networks of one width (figures 1, 2, 8): are their weights Gaussian once aligned and whitened?"""
    published = _published(scale, "clipping", "accuracy_weight_4", -1)
    return [
        train(
            Scattering(scale.deep),
            scale.data,
            scale.recipe,
            suffix=f"-gaussiantest-init{init}",
            init=init,
            scale=scale.name,
            group="gaussianity",
            published=published,
            serves=[(figure, "networks") for figure in (1, 2, 8)],
        )
        for init in range(1, scale.gaussianity + 1)
    ]


def resampling(scale):
    """Trained networks of every width, rainbow networks sampled from them, and those with their classifier trained
    (figure 3). Ours: white random features, the same network with its first weights frozen, classifier trained."""
    rows = {"trained": [], "resampled": [], "retrained": [], "white": []}
    for exponent in scale.resampling_widths:
        network = Scattering(scaled(scale.deep, exponent), skip=scale.resampling_skip)
        place = {"scale": scale.name, "width": 2.0**exponent}
        published = functools.partial(_published_by_width, scale, width=2.0**exponent)
        trained = train(
            network,
            scale.data,
            scale.recipe,
            group="resampling",
            serves=[(3, "trained")],
            published=published("trained"),
            **place,
        )
        sampled = resample(
            trained, network, scale.data, scale.repeats, serves=((3, "rainbow"),), published=published("rainbow")
        )
        retrained = retrain(
            sampled,
            network,
            scale.data,
            scale.recipe,
            group="resampling",
            serves=[(3, "retrained")],
            published=published("retrained"),
            **place,
        )
        white = train(
            network,
            scale.data,
            scale.recipe,
            frozen=True,
            suffix="-white-trainclf",
            kind="white",
            ours=True,
            group="resampling_baseline",
            serves=[(3, "white")],
            **place,
        )
        for row, experiment in zip(rows.values(), (trained, sampled, retrained, white)):
            row.append(experiment)
    return [experiment for row in rows.values() for experiment in row]


def activation_convergence(scale):
    """Scattering networks and ResNets of every width (figures 4, 5, 7): do activations converge with width?"""
    group = {"scale": scale.name, "group": "activation_convergence"}
    scattering = []
    for exponent in scale.activation_widths:
        for init in range(1, scale.activation_inits + 1):
            serves = [(4, "widths")] * (init == 1) + [(5, "scattering")]
            suffix = f"-init{init}" if scale.activation_inits > 1 else ""
            scattering.append(
                train(
                    Scattering(scaled(scale.deep, exponent)),
                    scale.data,
                    scale.recipe,
                    serves=serves,
                    width=2.0**exponent,
                    init=init,
                    suffix=suffix,
                    **group,
                )
            )
    resnets = []
    for exponent in scale.resnet_widths:
        shown = exponent == scale.resnet_shown
        published = _published(scale, "imagenet_spectra", "resnet_acc5", accuracy="acc5") if shown else None
        resnets.append(
            train(
                ResNet(2.0**exponent),
                scale.large_data,
                scale.resnet_recipe,
                prefix=scale.resnet_prefix,
                suffix=scale.resnet_suffix,
                width=2.0**exponent,
                published=published,
                serves=[(5, "resnet")] + [(7, "resnet")] * shown,
                **group,
            )
        )
    return scattering + resnets


def weight_convergence(scale):
    """Four-block networks of every width, a few of each, and many of width 1 (figure 6): do covariances converge?"""

    def variant(sizes, suffix, init, **fields):
        network = Scattering(sizes, norm=False, factorize=scale.shallow_factorize, decay=False)
        return train(
            network,
            scale.data,
            scale.recipe,
            scale=scale.name,
            group="weight_convergence",
            init=init,
            suffix=f"-paperexps{suffix}-init{init}",
            **fields,
        )

    *inner, last = scale.shallow
    published = _published(scale, "covariance_convergence", "clip_accuracies", 0, -1)
    widths = [
        variant((*scaled(inner, exponent), last), "-scalewidth", init, width=2.0**exponent, serves=[(6, "widths")])
        for exponent in scale.weight_widths
        for init in range(1, scale.weight_inits + 1)
    ]
    many = [
        variant(scale.shallow, "", init, published=published, serves=[(6, "many")]) for init in range(1, scale.many + 1)
    ]
    return widths + many


def imagenet_spectra(scale):
    """The complex skip network (figure 7); the ResNet beside it is one of `activation_convergence`."""
    published = _published(scale, "imagenet_spectra", "scattering_acc5", accuracy="acc5")
    return [
        train(
            scale.large,
            scale.large_data,
            scale.large_recipe,
            scale=scale.name,
            group="imagenet_spectra",
            serves=[(7, "scattering")],
            published=published,
        )
    ]


def dynamics(scale):
    """One network whose first epochs are kept (figure 9): training amplifies the weights where Ĉ is large."""
    return [
        train(
            Scattering(scale.deep, norm=False, decay=False),
            scale.data,
            scale.recipe,
            scale=scale.name,
            group="dynamics",
            serves=[(9, "network")],
        )
    ]


# --- The registry ------------------------------------------------------------------------------------------------


@functools.cache
def experiments(scale="paper"):
    """All experiments of a scale, "paper" or "laptop", as a tuple in the order in which they are listed and run."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: not known; {' or '.join(SCALES)}")
    chosen = {"paper": PAPER, "laptop": LAPTOP}[scale]
    groups = (gaussianity, resampling, activation_convergence, weight_convergence, imagenet_spectra, dynamics)
    return tuple(experiment for group in groups for experiment in group(chosen))


def by_name(scale="paper"):
    """{name: experiment} of a scale."""
    return {experiment.name: experiment for experiment in experiments(scale)}


def groups(scale="paper"):
    """Names of the groups, in order."""
    return list(dict.fromkeys(experiment.group for experiment in experiments(scale)))


def figures(scale="paper"):
    """Numbers of the figures that experiments serve, in order."""
    return sorted({figure for experiment in experiments(scale) for figure in experiment.figures})


def by_figure(scale, figure):
    """All experiments that a figure of the paper (1 ... 9) needs."""
    return [experiment for experiment in experiments(scale) if figure in experiment.figures]


def figure_sets(scale, figure):
    """{set: experiments} of a figure, each set narrowest first, then by number of initialisation.

    1, 2, 8: networks. 3: trained, rainbow, retrained, white. 4: widths. 5: scattering, resnet. 6: widths, many.
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


# --- Variants for a trial, and comparing commands ----------------------------------------------------------------


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
    """The experiment as task number `init` of a cluster's array runs it: named NAME-initN, with a seed of its own."""
    other = renamed(experiment, lambda name: f"{name}-init{init}")
    return dataclasses.replace(other, seed=seed_of(other.name), init=init)


def trial(experiment, overrides):
    """The experiment with other training flags ({"--epochs": "1"}), in the folder trial-FLAGS/NAME."""
    label = "-".join(["trial"] + [flag.strip("-") + value.replace(":", "_") for flag, value in overrides.items()])
    other = renamed(experiment, lambda name: f"{label}/{name}")
    if other.script != "main_block.py":
        return other
    flags = flags_of(other.arguments)
    for flag, value in overrides.items():
        flags[flag] = (value,)
    epochs = int(overrides.get("--epochs", other.epochs))
    arguments = tuple(token for flag, values in flags.items() for token in (flag, *values))
    share = epochs / other.epochs
    return dataclasses.replace(
        other, arguments=arguments, epochs=epochs, cost=int(other.cost * share), steps=int(other.steps * share)
    )


def flags_of(arguments):
    """{flag: values} of a command's arguments, in order. Numbers are never flags."""
    flags, values = {}, []
    for token in arguments:
        if token.startswith("-") and not token[1:2].isdigit():
            values = flags[token] = []
        else:
            values.append(token)
    return {flag: tuple(values) for flag, values in flags.items()}


def printed(command):
    """A command as a shell would take it."""
    return shlex.join(command)
