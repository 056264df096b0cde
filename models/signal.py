"""The type of a feature map: what a block must know of its input before any image is seen; imports no torch."""

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

    def joined(self, other: "Signal") -> "Signal":
        """The type of two feature maps concatenated along channels. Raises ValueError if they differ in size."""
        if (self.height, self.width) != (other.height, other.width):
            raise ValueError(f"{self} and {other} differ in size: they cannot be concatenated")
        return self.with_(channels=self.channels + other.channels, complex=self.complex or other.complex)


def padded_size(size: int) -> int:
    """Size of an image axis after the reflection padding of a wavelet transform."""
    return ((size + 2) // 2 + 1) * 2


def output_size(size: int, subsample: bool) -> int:
    """Size of an image axis after a wavelet transform: padded, filtered, subsampled by 2 (or not), border dropped."""
    return padded_size(size) // 2 - 2 if subsample else padded_size(size) - 4


def padding_indices(size: int) -> list[int]:
    """The sample of an axis at each place of the padded axis: periodic reflection, borders not repeated."""
    extra = padded_size(size) - size
    period = max(2 * (size - 1), 1)
    places = range(-(extra // 2), size + (extra + 1) // 2)
    return [min(place % period, -place % period) for place in places]
