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
            if name in PROJECTIONS and config.remove_projection or name == IDENTITY:
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
        if inverse and (signal.complex or signal.channels % 2):
            raise ValueError(f"'C' needs an even number of real channels, but its input has {signal}")
        if not inverse and not signal.complex:
            raise ValueError(f"'R' needs a complex input, but its input has {signal}")
        self.inverse = inverse
        self.out = signal.with_(channels=signal.channels // 2 if inverse else 2 * signal.channels, complex=inverse)

    def forward(self, x):
        return real_to_complex(x) if self.inverse else complex_to_real(x)


class Branches(nn.Module):
    """(B, C, M, N) -> both branches' outputs, concatenated along channels; complex if either is."""

    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right
        self.out = left.out.joined(right.out)

    def forward(self, x):
        return concatenate(self.left(x), self.right(x))


class SkipConnection(Branches):
    """`rho`: z -> [left(z), right(ρ(z))]."""

    def __init__(self, signal, config):
        rho = build_module("mod", signal, config)
        left = Sequence(config.linear_arch, signal, config)
        super().__init__(left, Sequence(config.non_linear_arch, rho.out, config))
        self.rho = rho

    def forward(self, x):
        return concatenate(self.left(x), self.right(self.rho(x)))


def build_module(name, signal, config):
    """The module called `name` in the grammar, for inputs of type `signal`; it has an attribute `out`, a Signal."""

    def sequence(names, signal=signal):
        return Sequence(names, signal, config)

    number = {"bias": config.non_linearity_bias, "gain": config.non_linearity_gain}
    builders = {
        "Fw": lambda: WaveletTransform(signal, config, sequence),
        "mod": lambda: NonLinearity(config.non_linearity, signal, **number, learned=config.non_linearity_learned),
        "rho": lambda: SkipConnection(signal, config),
        "Std": lambda: Standardization(signal, config.homogeneous),
        "N": lambda: Normalization(signal),
        "R": lambda: RealImaginary(signal),
        "C": lambda: RealImaginary(signal, inverse=True),
        "B": lambda: Branches(sequence(config.left_arch), sequence(config.right_arch)),
        "FrhoF": lambda: Frame(signal, config),
        **dict.fromkeys(PROJECTIONS, lambda: Projection(name, signal, config)),
    }
    return builders[name]()


class Block(nn.Module):
    """One block: (B, C, M, N) -> (B, C', M', N'), each real or complex.

    `P` is its projection and `std` its standardisation, each None if there is none at the block's top level. `features`
    gives the projection's input, W_j's input in the paper's notation φ_{j-1}; `project` is what follows.

    The blocks of the paper run as one operation, the FusedBlock `fused`. They run module by module if `fast` is set to
    False, if any of their modules has a hook or was replaced, and for numbers other than float32. Without gradients,
    hooks on `std`, `P` or what follows leave the operations before them fused.
    """

    def __init__(self, signal, config: BlockConfig):
        super().__init__()
        self.signal = signal
        self.body = Sequence(config.arch, signal, config)
        self.out = self.body.out
        stages = list(self.body)
        projections = [index for index, stage in enumerate(stages) if isinstance(stage, Projection)]
        self._cut = projections[0] if projections else len(stages)
        self.fused = fused_block(signal, stages)
        self._as_built = [(module, type(module), dict(module._modules)) for module in (self, *self.body.modules())]
        called = {m for stage in (self.std, *stages[self._cut :]) if stage is not None for m in stage.modules()}
        self._hidden = [each for each in self._as_built if each[0] not in called]  # by fused features
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
        if self._fuses(x.dtype, self._hidden) and not torch.is_grad_enabled():
            x = self.fused.features(x)
            stages = [stage for stage in stages if isinstance(stage, Standardization)]
        return _through(stages, x)

    def project(self, features):
        """(B, D, M', N') -> the block's output (B, C', M', N'): the projection and what follows it."""
        return _through(list(self.body)[self._cut :], features)

    def forward(self, x):
        if self.runs_fused(x.dtype):
            return from_planar(self.forward_planar(to_planar(x)), 2 if self.out.complex else 1)
        if self._fuses(x.dtype, self._hidden):
            return self.project(self.features(x))
        return self.body(x)

    def forward_planar(self, x):
        """`forward` of a block that runs fused, from (B, M, N, p·C) to (B, M', N', q·C')."""
        return self.fused(x, self.P.weight, self.std)

    def runs_fused(self, dtype):
        """Whether `forward` runs as one operation for images of this type."""
        return self._fuses(dtype, self._as_built)

    def _fuses(self, dtype, modules):
        possible = self.fused is not None and self.fast and dtype in (torch.float, torch.cfloat)
        return possible and all(_is_as_built(*each) for each in modules)


def _through(stages, x):
    for stage in stages:
        x = stage(x)
    return x


def exclude_from_compilation(network):
    """Keep `torch.compile` from a network with blocks: its operations are complex, or have their own backward pass."""
    if any(isinstance(module, Block) for module in network.modules()):
        kind = type(network)  # a class of its own, so that copies of the network run their own modules
        network.__class__ = type(kind.__name__, (kind,), {"forward": torch.compiler.disable(kind.forward)})


def _is_as_built(module, kind, children):
    """Whether a module still has its class and children, and has neither hooks nor its own `forward`."""
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
    """Whether the only non-linearity is the complex modulus, at its place, and φ and ψ have no other modules."""
    if skip is None:
        empty, rest = [transform.phi], list(transform.psi)
    else:
        empty, rest = [transform.phi, transform.psi, skip.left, skip.right], [skip.rho]
    return not any(map(len, empty)) and len(rest) == 1 and type(rest[0]) is NonLinearity and rest[0].name == "mod"
