"""The block grammar: a list of module names becomes a module, e.g. ('Fw', 'Std', 'Pr', 'N')."""

import torch
from torch import nn

from models.classifier import complex_to_real, real_to_complex
from models.config import BlockConfig
from models.fast import FusedBlock
from models.frame import Frame
from models.names import IDENTITY, PROJECTIONS, check_names
from models.nonlinearity import NonLinearity
from models.planar import from_planar, to_planar
from models.projection import Projection
from models.scattering import WaveletTransform, concatenate
from models.standardization import Normalization, Standardization


class Sequence(nn.Sequential):
    """Modules one after another, each under its name in the grammar; `out` is the type of the last output."""

    def __init__(self, names, signal, config):
        super().__init__()
        check_names(names)
        for name in names:
            if name in PROJECTIONS and config.remove_projection or name == "id":
                continue
            module = build_module(name, signal, config)
            signal = module.out
            key, count = name, 1
            while hasattr(self, key):
                count += 1
                key = f"{name}_{count}"
            self.add_module(key, module)
        self.out = signal


class RealImaginary(nn.Module):
    """`R`: (B, C, M, N) complex -> (B, 2C, M, N) real, parts interleaved; `C` (`inverse`): the other way."""

    def __init__(self, signal, inverse=False):
        super().__init__()
        if inverse:
            if signal.complex or signal.channels % 2:
                raise ValueError(f"'C' needs an even number of real channels, but its input has {signal}")
            self.out = signal.with_(channels=signal.channels // 2, complex=True)
        else:
            if not signal.complex:
                raise ValueError(f"'R' needs a complex input, but its input has {signal}")
            self.out = signal.with_(channels=2 * signal.channels, complex=False)
        self.inverse = inverse

    def forward(self, x):
        return real_to_complex(x) if self.inverse else complex_to_real(x)


class Branches(nn.Module):
    """(B, C, M, N) -> both branches' outputs, concatenated along channels; complex if either is."""

    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right
        if (left.out.height, left.out.width) != (right.out.height, right.out.width):
            raise ValueError(f"two branches differ in size ({left.out} and {right.out}): they cannot be concatenated")
        self.out = left.out.with_(
            channels=left.out.channels + right.out.channels, complex=left.out.complex or right.out.complex
        )

    def forward(self, x):
        return concatenate(self.left(x), self.right(x))


class SkipConnection(Branches):
    """`rho`: z -> [linear(z), non_linear(ρ(z))]."""

    def __init__(self, signal, config):
        rho = build_module("mod", signal, config)
        left = Sequence(config.linear_arch, signal, config)
        super().__init__(left, Sequence(config.non_linear_arch, rho.out, config))
        self.rho = rho

    def forward(self, x):
        return concatenate(self.left(x), self.right(self.rho(x)))


def build_module(name, signal, config):
    """The module called `name` in the grammar, for inputs of type `signal`; it has an attribute `out`, a Signal."""
    if name == "Fw":
        module = WaveletTransform(signal, config.angles, config.kind, config.scales_per_octave, config.full_angles)
        phi = Sequence(config.phi_arch, module.phi_signal, config)
        if module.number:
            psi = Sequence(config.psi_arch, module.psi_signal, config)
            module.attach(phi, phi.out, psi, psi.out)
        else:
            module.attach(phi, phi.out, nn.Identity(), phi.out)
        return module
    if name == "mod":
        return NonLinearity(
            config.non_linearity,
            signal,
            config.non_linearity_bias,
            config.non_linearity_gain,
            config.non_linearity_learned,
        )
    if name in PROJECTIONS:
        return _build_projection(name, signal, config)
    builders = {
        "rho": lambda: SkipConnection(signal, config),
        "Std": lambda: Standardization(signal, config.homogeneous),
        "N": lambda: Normalization(signal),
        "R": lambda: RealImaginary(signal),
        "C": lambda: RealImaginary(signal, inverse=True),
        "B": lambda: Branches(Sequence(config.left_arch, signal, config), Sequence(config.right_arch, signal, config)),
        "FrhoF": lambda: Frame(signal, config.dictionary_size, config.dictionary_non_linearity),
    }
    return builders[name]()


def _build_projection(name, signal, config):
    size = getattr(config, f"{name}_size")
    if size is None:
        flag = "--L-proj-size" if name == "P" else f"--{name}-size"
        raise ValueError(f"the module {name!r} needs its number of channels ({flag})")
    return Projection(
        signal,
        None if size == IDENTITY else size,
        is_complex=name == "Pc" or (name == "P" and signal.complex),
        basis=config.projection_basis,
        eigenvalues=config.projection_eigenvalues,
        initialization=config.projection_initialization,
        frozen=config.freeze_projection,
        orthogonal=config.orthogonal,
    )


class Block(nn.Module):
    """One block: (B, C, M, N) -> (B, C', M', N'), each real or complex.

    `P` is its projection and `std` its standardisation, each None if there is none at the block's top level. `features`
    gives the projection's input, W_j's input in the paper's notation φ_{j-1}; `project` is what follows.

    The blocks of the paper run as one operation (`models.fast`). They run module by module if `fast` is set to False,
    if any of their modules has a hook or was replaced, and for numbers other than float32.
    """

    def __init__(self, signal, config: BlockConfig):
        super().__init__()
        self.signal = signal
        self.body = Sequence(config.arch, signal, config)
        self.out = self.body.out
        stages = list(self.body)
        projections = [index for index, stage in enumerate(stages) if isinstance(stage, Projection)]
        self._cut = projections[0] if projections else len(stages)
        self._fused = fused_block(signal, stages)
        self._as_built = [(module, type(module), dict(module._modules)) for module in (self, *self.body.modules())]
        self.fast = True

    @property
    def P(self):
        return self.body[self._cut] if self._cut < len(self.body) else None

    @property
    def std(self):
        return next((stage for stage in self.body if isinstance(stage, Standardization)), None)

    def features(self, x):
        """(B, C, M, N) -> (B, D, M', N'), the input of the projection (the block's output if it has none)."""
        stages = list(self.body)[: self._cut]
        if self.runs_fused(x.dtype) and not torch.is_grad_enabled():
            x = self._fused.features(x)
            stages = [stage for stage in stages if isinstance(stage, Standardization)]
        for stage in stages:
            x = stage(x)
        return x

    def project(self, features):
        """(B, D, M', N') -> the block's output (B, C', M', N'): the projection and what follows it."""
        for stage in list(self.body)[self._cut :]:
            features = stage(features)
        return features

    def forward(self, x):
        if self.runs_fused(x.dtype):
            return from_planar(self.forward_planar(to_planar(x)), 2 if self.out.complex else 1)
        return self.body(x)

    def forward_planar(self, x):
        """`forward` from (B, M, N, p·C) to (B, M', N', q·C'), the form in which fused blocks hand maps on."""
        return self._fused(x, self.P.weight, self.std)

    def columns_of(self, x):
        """`features` before `std` from (B, M, N, p·C), as the fused block computes with them: rows of real columns."""
        return self._fused.columns_of(x)

    def parts_of(self, columns):
        """Real and imaginary parts of such columns, and their order: see `FusedBlock.parts_of`."""
        return self._fused.parts_of(columns)

    def forward_from(self, columns, x):
        """`forward_planar` in evaluation mode, given the columns of x."""
        return self._fused.forward_from(columns, x, self.P.weight, self.std)

    def runs_fused(self, dtype):
        """Whether `forward` runs as one operation for images of this type."""
        if self._fused is None or not self.fast or dtype not in (torch.float, torch.cfloat):
            return False
        return all(_is_as_built(*each) for each in self._as_built)


def exclude_from_compilation(network):
    """Keep `torch.compile` from the fused operations of a network: their backward is their own."""
    for block in network.modules():
        if isinstance(block, Block) and block._fused is not None:
            block.runs_fused = torch.compiler.disable(block.runs_fused)
            block._fused.forward = torch.compiler.disable(block._fused.forward)


def _is_as_built(module, kind, children):
    """Whether a module has still its class and its children, and neither hooks nor a `forward` of its own."""
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    changed = type(module) is not kind or module._modules != children or "forward" in module.__dict__
    return not (hooked or changed)


def fused_block(signal, stages):
    """The FusedBlock of a list of modules; None if they are not of its pattern, or of classes that it does not know.

    The pattern is `Fw [rho] [Std] P|Pr|Pc [N]` with the complex modulus, ψ ↦ |ψ| or z ↦ [z, |z|].
    """
    stages = list(stages)

    def take(kind):
        return stages.pop(0) if stages and type(stages[0]) is kind else None

    pattern = WaveletTransform, SkipConnection, Standardization, Projection, Normalization
    transform, skip, std, projection, norm = map(take, pattern)
    if stages or transform is None or projection is None or projection.basis is not None or not transform.number:
        return None
    if skip is None and signal.complex or not _is_plain_modulus(transform, skip):
        return None
    standardized = "homogeneous" if std is not None and std.homogeneous else std is not None
    return FusedBlock(transform, signal, skip is not None, standardized, norm is not None)


def _is_plain_modulus(transform, skip):
    """Whether the only non-linearity is the complex modulus, at its place, with nothing beside it."""
    if skip is None:
        empty, rest = [transform.phi], list(transform.psi)
    else:
        empty, rest = [transform.phi, transform.psi, skip.left, skip.right], [skip.rho]
    return not any(map(len, empty)) and len(rest) == 1 and type(rest[0]) is NonLinearity and rest[0].name == "mod"
