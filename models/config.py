"""Everything that defines a network, as plain data; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.names import BATCH_NORMS, PLAIN, STANDARD_NON_LINEARITIES, check_choice
from models.signal import Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockConfig:
    """Everything that defines one block but the type of its input. Architectures are tuples of names of MODULES."""

    arch: tuple
    phi_arch: tuple = ()
    psi_arch: tuple = ()
    linear_arch: tuple = ()
    non_linear_arch: tuple = ()
    left_arch: tuple = ()
    right_arch: tuple = ()
    angles: int = 4
    full_angles: bool = False
    scales_per_octave: int = 1
    kind: str | int = PLAIN  # or 0, 1: the steps of a factorised octave
    non_linearity: str = "mod"
    non_linearity_bias: float | None = None
    non_linearity_gain: float | None = None
    non_linearity_learned: bool = False
    homogeneous: bool = False
    P_size: int | str | None = None  # a number of channels, "id", or None if the block has no such projection
    Pr_size: int | str | None = None
    Pc_size: int | str | None = None
    remove_projection: bool = False
    freeze_projection: bool = False
    projection_basis: Tensor | None = None
    projection_eigenvalues: Tensor | None = None
    projection_initialization: Tensor | None = None
    orthogonal: bool = False
    dictionary_size: int = 2048
    dictionary_non_linearity: str = "relu"
    dictionary_threshold: float = 1.0  # λ*: the threshold is λ*/√(atoms)
    dictionary_delta: float = 0.01
    dictionary_norms: float = 0.0  # the greatest ratio of two atoms' norms, or 0: any


@dataclass(frozen=True, eq=False)
class ScatNetConfig:
    """Everything that defines a learned scattering network."""

    input: Signal
    num_classes: int
    blocks: tuple[BlockConfig, ...]
    classifier_batch_norm: str = "affine"  # or "std", "none"
    classifier_bias: bool = True
    average_pooling: bool = False
    average_kernel: int = 1
    identity_classifier: bool = False
    mix_input: bool = False
    yuv: bool = False
    regularization: str | None = None  # or "parseval", "quadrature"
    beta: float = 0.01


@dataclass(frozen=True)
class StandardConfig:
    """A standard network: `name` is "resnet18-custom", "vgg11-custom", … or one of torchvision's ("resnet18").

    width: every number of channels w becomes int(width·w). batch_norm: "none", "pre" (before the non-linearity, as
    torchvision) or "post" (after it). bias: affine batch norm and biases of the layers before the last;
    classifier_bias: that of the last. non_linearity: a name, or names that take turns in the order of the layers;
    init_gain, init_bias: where their numbers start. pretrained: torchvision's ImageNet weights (torchvision's own
    networks only). Raises ValueError for values outside these.
    """

    name: str
    num_classes: int
    input: Signal
    width: float = 1.0
    batch_norm: str = "pre"
    bias: bool = True
    classifier_bias: bool = True
    non_linearity: str | tuple[str, ...] = "relu"
    init_gain: float = 1.0
    init_bias: float = 0.0
    pretrained: bool = False

    def __post_init__(self):
        check_choice("batch norm", self.batch_norm, BATCH_NORMS)
        for name in self.non_linearities:
            check_choice("non-linearity", name, STANDARD_NON_LINEARITIES)
        if self.num_classes < 1:
            raise ValueError(f"a network needs at least one class, not {self.num_classes}")
        if self.input.complex:
            raise ValueError(f"{self.name} needs real images, not {self.input}")
        if self.pretrained and self.name.endswith("-custom"):
            plain = self.name.removesuffix("-custom")
            raise ValueError(f"only torchvision's own networks have trained weights: {plain}, not {self.name}")

    @property
    def non_linearities(self) -> tuple:
        """The names that take turns."""
        return (self.non_linearity,) if isinstance(self.non_linearity, str) else self.non_linearity

    def scaled(self, channels: int) -> int:
        """int(width·channels); raises ValueError if nothing is left."""
        scaled = int(self.width * channels)
        if scaled < 1:
            raise ValueError(f"width scaling {self.width:g} leaves none of {channels} channels of {self.name}")
        return scaled
