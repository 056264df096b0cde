"""Sets of images in memory, cropped and mirrored a batch at a time."""

from dataclasses import dataclass, field, replace

import torch

from utils.data.batches import ImageSet, Normalization, generator

_NORMALIZED_BYTES = 64 << 20  # sets of at most this size are also kept normalised
_RESIDENT_BYTES = 1 << 30  # sets of at most this size are kept on the accelerator


def crop_and_flip(images, offsets, flips, padding):
    """Crops each image of (B, M, N, C) at its `offsets` (B, 2), row and column, after `padding` zero pixels were added
    on every side, and mirrors those whose `flips` (B,) is true. Same shape; offsets and flips are on the CPU."""
    count, height, width, channels = images.shape
    flipped = flips.nonzero()[:, 0]
    chosen = images.index_select(0, flipped.to(images.device))
    padded = images.new_zeros(count + len(flipped), height + 2 * padding, width + 2 * padding, channels)
    inside = padded[:, padding : padding + height, padding : padding + width]
    inside[:count] = images
    inside[count:] = chosen.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # fast in this order
    source = torch.arange(count)
    source[flipped] = count + torch.arange(len(flipped))
    left = torch.where(flips, 2 * padding - offsets[:, 1], offsets[:, 1])  # as if mirrored after the crop
    rows = source[:, None] * padded.shape[1] + offsets[:, :1] + torch.arange(height)
    starts = rows * padded.shape[2] + left[:, None]  # (B, M): first pixel of each row
    windows = padded.view(-1).unfold(0, width * channels, channels)  # (pixels, N·C), overlapping
    return windows.index_select(0, starts.view(-1).to(images.device)).view(images.shape)


@dataclass(frozen=True, eq=False)
class MemorySet(ImageSet):
    """Images in memory: `images` (n, M, N, C) uint8, `labels` (n,) int64 in 0..num_classes−1.

    With a `padding`, augmented batches are cropped from images with that many zero pixels around them (before
    normalisation) and mirrored with probability 1/2; without, augmentation changes nothing. `original`: the images
    before they were resized, which rounds differently on other processors.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int
    normalization: Normalization
    padding: int = 0
    original: torch.Tensor | None = None
    _kept: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def image_shape(self):
        """(C, M, N)"""
        _, height, width, channels = self.images.shape
        return channels, height, width

    @property
    def content(self):
        return (self.images if self.original is None else self.original).numpy()

    def select(self, indices, labels, num_classes):
        """The set of the images `indices`, with as many new `labels`."""
        images, original = (None if each is None else each[indices] for each in (self.images, self.original))
        return replace(self, images=images, original=original, labels=labels, num_classes=num_classes)

    def batches(self, loader):
        """The batches of a `Loader`."""
        read = self._reader(loader)
        for indices in loader.steps:
            chosen = torch.from_numpy(indices)
            yield read(chosen), _to(self.labels[chosen], loader.device)

    def _reader(self, loader):
        """A function from indices (B,) to normalised images (B, C, M, N)."""
        device, draws = loader.device, self._draws(loader.key) if loader.key and self.padding else None
        normalize = self.normalization.on(device, self.images.shape[2])
        if draws is None and 4 * self.images.nbytes <= _NORMALIZED_BYTES:
            normalized = self._once("normalized", device, lambda: normalize(self.images.to(device)).permute(0, 2, 3, 1))
            return lambda chosen: normalized.index_select(0, chosen.to(device)).permute(0, 3, 1, 2)
        is_resident = device.type != "cpu" and self.images.nbytes <= _RESIDENT_BYTES
        pixels = self._once("pixels", device, lambda: self.images.to(device)) if is_resident else self.images

        def read(chosen):
            images = _to(pixels.index_select(0, chosen.to(pixels.device)), device)  # (B, M, N, C)
            if draws and len(chosen):
                images = crop_and_flip(images, *(draw[chosen] for draw in draws), self.padding)
            return normalize(images)

        return read

    def _once(self, name, device, make):
        """What `make` makes, kept for the next time."""
        if (name, device) not in self._kept:
            self._kept[name, device] = make()
        return self._kept[name, device]

    def _draws(self, key):
        """Offsets (n, 2) in 0..2·padding and flips (n,) for `crop_and_flip`."""
        random = generator(*key)
        offsets = random.integers(0, 2 * self.padding, (len(self), 2), endpoint=True)
        return torch.from_numpy(offsets), torch.from_numpy(random.random(len(self)) < 0.5)


def _to(tensor, device):
    """The tensor on `device`, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
