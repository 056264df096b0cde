"""What the analysis must know of a class of modules: an adapter, registered once for the class and its subclasses.

Three kinds of modules have adapters: weight layers (`Layer`), normalisations with running statistics (`Norm`) and whole
networks that are not run operation by operation (`Architecture`). Torch's own layers are known. A layer of your own:

>>> import torch, rainbow
>>> class Transposed(torch.nn.Module):  # a linear layer that keeps its weights as (D, N)
...     def __init__(self, inputs, outputs):
...         super().__init__()
...         self.kernel = torch.nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
...     def forward(self, x):
...         return x @ self.kernel  # (B, D) -> (B, N)
>>> class TransposedLayer(rainbow.Layer):
...     parameter, channel_axis = "kernel", -1
...     def to_matrix(self, kernel):
...         return kernel.T  # (N, D)
...     def from_matrix(self, matrix):
...         return matrix.T
>>> rainbow.register(Transposed, TransposedLayer)
>>> network = torch.nn.Sequential(Transposed(12, 8), torch.nn.ReLU(), Transposed(8, 3))
>>> analysis = rainbow.Rainbow.fit(network, [torch.randn(100, 12)])
>>> analysis.sample(widths=[20])(torch.randn(5, 12)).shape
torch.Size([5, 3])
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from torch import nn

_ADAPTERS: dict[tuple[type, str], Any] = {}
A = TypeVar("A", bound="Adapter")


class Adapter:
    """What the analysis knows of a module; `role`: "layer", "norm" or "architecture"."""

    role: ClassVar[str]

    @classmethod
    def find(cls: type[A], module: nn.Module) -> type[A] | None:
        """The adapter of this role that is registered for the module's class, or for the nearest of its bases."""
        known = (_ADAPTERS.get((base, cls.role)) for base in type(module).__mro__)
        return next((adapter for adapter in known if adapter is not None), None)


def register(module_class: type[nn.Module], adapter: type[Adapter]) -> None:
    """Teaches the analysis a class of modules and its subclasses: how to read, set, rotate, resize or run them.

    adapter: a subclass of `Layer`, `Norm` or `Architecture`; it replaces the class's earlier one of that role.
    Raises TypeError for anything else.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"only classes of modules can be registered, not {module_class!r}")
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter) and hasattr(adapter, "role")):
        raise TypeError(f"an adapter is a subclass of Layer, Norm or Architecture, not {adapter!r}")
    _ADAPTERS[module_class, adapter.role] = adapter
