"""The type of a feature map: what a block must know of its input before any image is seen."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Signal:
    """A batch of feature maps has shape (B, channels, height, width) and is real or complex."""

    channels: int
    height: int
    width: int
    complex: bool = False

    @property
    def real_channels(self) -> int:
        """Number of real channels: a complex channel counts as two."""
        return self.channels * (2 if self.complex else 1)

    def __str__(self):
        kind = "complex" if self.complex else "real"
        return f"{self.channels} {kind} channels of {self.height}×{self.width}"

    def with_(self, **changes) -> "Signal":
        return replace(self, **changes)
