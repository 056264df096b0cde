"""How many times faster batches of CIFAR's shape come from memory than from torchvision's transforms of PIL images.

Both crop with 4 zero pixels around, mirror and normalise every image, in this process (no workers), one after the
other on the same images; the medians are of epochs after a first one:

    python benchmarks/pipeline.py [--images 10000] [--batch-size 128] [--repeats 5] [--threads 1]
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data.batches import MemorySet  # noqa: E402
from utils.data.datasets import COLOR, PADDING  # noqa: E402


class PilImages(Dataset):
    """Images one at a time through torchvision's transforms, as its CIFAR10 gives them."""

    def __init__(self, images, labels):
        self.images = images.numpy()
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(images.shape[1], PADDING),
                transforms.ToTensor(),
                transforms.Normalize(COLOR.mean, COLOR.std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def seconds(batches, size):
    """Seconds to go once through `batches`, which hold `size` images in all."""
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    assert count == size
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = torch.randint(0, 256, (args.images, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (args.images,))
    ours = MemorySet(images, labels, 10, COLOR, PADDING)
    theirs = DataLoader(PilImages(images, labels), args.batch_size, shuffle=True)
    times = {"ours": [], "torchvision": []}
    for epoch in range(args.repeats + 1):
        times["torchvision"].append(seconds(theirs, args.images))
        loader = ours.loader(args.batch_size, shuffle=True, epoch=epoch, augment=True)
        times["ours"].append(seconds(loader, args.images))
    middle = {name: median(each[1:]) for name, each in times.items()}
    for name, each in middle.items():
        print(f"{name:12} {each / args.images * 1e6:8.2f} µs per image")
    print(f"{middle['torchvision'] / middle['ours']:.1f} times faster than torchvision's transforms")


if __name__ == "__main__":
    main()
