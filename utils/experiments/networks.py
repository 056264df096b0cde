"""What is trained, on what, and how: the flags, the part of a name and the cost of each; imports no torch."""

from dataclasses import dataclass, replace

from utils.runs.options import image_sizes

IMAGENET = "PATH/TO/IMAGENET"
ANGLES = 4


@dataclass(frozen=True)
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
FASHION_MNIST = Data("fashion", ("--fashion-mnist", "--data-subset", "0:2000"), 1, 28, 10, 20_000, 10_000)
DIGITS = Data("digits", ("--digits",), 1, 8, 10, 1297, 500)
DIGITS32 = Data("digits32", ("--digits", "--resize-images", "32"), 1, 32, 10, 1297, 500)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum 0.9 whose rate is divided by 10 every `drop` epochs."""

    epochs: int
    drop: int
    lr: float
    batch: int
    workers: int | None = None

    @property
    def arguments(self):
        words = f"-p 1000 --epochs {self.epochs} --learning-rate-adjust-frequency {self.drop} --lr {self.lr}"
        workers = "" if self.workers is None else f" -j {self.workers}"
        return tuple(f"{words}{workers} --batch-size {self.batch}".split())


@dataclass(frozen=True)
class Scattering:
    """A learned scattering network (paper, section 5): per block a wavelet transform, then a learned projection.

    `sizes`: channels after each block. `skip`: 'rho', z -> [z, |z|], instead of the modulus of psi. `norm`: 'N'.
    `kind`: the projection's weights, "Pr" real or "Pc" complex. `factorize`: blocks from this one on are factorised
    (None: no block is). `plain_classifier`: batch norm without affine part and no bias. `decay`: weight decay.
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
        letters = self.kind.replace("P", "WP").removesuffix("r")
        parts = ["".join(f"{letters}{size}" for size in self.sizes)]
        parts += ["skip"] * self.skip + ["norm"] * self.norm + [f"L{ANGLES}"]
        parts += ["clbnstd-clnobias"] * self.plain_classifier + ["nowd"] * (not self.decay)
        return "-".join(parts)

    @property
    def arguments(self):
        blocks = len(self.sizes)
        modules = ["Fw"] + ["rho"] * self.skip + ["Std", self.kind] + ["N"] * self.norm
        words = [] if self.skip else ["--psi-arch", "mod"]
        words += [f"--{self.kind}-size", *self.sizes]
        words += [] if self.factorize is None else ["--factorize-filters", self.factorize]
        words += ["--n-blocks", blocks, "--scattering-wph", *[1] * blocks, "--scat-angles", *[ANGLES] * blocks]
        words += ["--classifier-batch-norm", "std", "--no-classifier-bias"] if self.plain_classifier else []
        return ("-a", " ".join(modules), *map(str, words + ([] if self.decay else ["--weight-decay", 0])))

    def multiply_adds(self, data):
        """Real multiply-adds of the projections and the classifier in one forward pass of one image.

        The wavelet transform is left out: its share falls as the network widens. Of the inputs [z, |z|] of a skip
        network the first half is complex and the second real, so real weights cost 3/2 per entry, complex ones 3.
        """
        per_weight = {(False, "Pr"): 2, (True, "Pr"): 3, (True, "Pc"): 6}[self.skip, self.kind]
        images = image_sizes(data.size, len(self.sizes), self.factorize)
        inputs = [(1 + self.skip) * (1 + ANGLES) * c for c in (data.channels, *self.sizes[:-1])]
        total = sum(c * d * m * m for c, d, m in zip(self.sizes, inputs, images)) * per_weight // 2
        return total + data.classes * self.sizes[-1] * (1 + self.skip) * images[-1] ** 2

    def scaled(self, exponent, last=True):
        """The network with its widths times 2^exponent, but for the last one if `last` is False."""
        sizes = [int(size * 2.0**exponent) for size in self.sizes]
        return replace(self, sizes=tuple(sizes if last else [*sizes[:-1], self.sizes[-1]]))


@dataclass(frozen=True)
class ResNet:
    """torchvision's ResNet-18 with every width scaled; batch norm after the non-linearity, no biases."""

    width: float

    @property
    def label(self):
        return f"resnet18-nobias-clnobias-bnpost-widthX{self.width:g}"

    @property
    def arguments(self):
        flags = "--standard-no-bias --standard-classifier-no-bias --standard-batch-norm post"
        return tuple(f"--arch resnet18-custom {flags} --standard-width-scaling {self.width:g}".split())

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
