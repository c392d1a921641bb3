"""A tiny classifier and tiny data, for contract checks and tests: no files, no network, no extras."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eff.data import Batch, Data
from eff.schemas import DataSpec, TaskSpec

MODEL = "eff.testing.samples:tiny_cnn"
DATA = "eff.testing.samples:blobs"
CLASSES = 4
SIZE = 8


class TinyCNN(nn.Module):
    """Three convolutions and a linear layer; enough for first, middle and last layers to exist."""

    def __init__(self, num_classes: int = CLASSES, in_channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        x = self.relu(self.conv3(x))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def tiny_cnn(num_classes: int = CLASSES, in_channels: int = 1) -> nn.Module:
    """Return the tiny classifier, untrained."""
    return TinyCNN(num_classes, in_channels)


class BlobSplit:
    """Grey images (1, 8, 8) with one bright quadrant, which is the class, in noise."""

    def __init__(self, samples: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(samples) % CLASSES
        self.images = 0.4 * torch.rand(samples, 1, SIZE, SIZE, generator=generator)
        half = SIZE // 2
        for quadrant in range(CLASSES):
            row, column = divmod(quadrant, 2)
            chosen = self.labels == quadrant
            self.images[chosen, :, row * half : (row + 1) * half, column * half : (column + 1) * half] += 0.5

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples; the augmentation is weak noise."""
        chosen = torch.as_tensor(list(indices))
        image = self.images[chosen]
        if generator is not None:
            image = (image + 0.02 * torch.rand(image.shape, generator=generator)).clamp(0, 1)
        return {"image": image, "label": self.labels[chosen]}

    def fingerprint(self) -> str:
        """Return a hash of the images."""
        return hashlib.blake2b(self.images.numpy().tobytes(), digest_size=8).hexdigest()


def blobs(spec: DataSpec, task: TaskSpec | None = None) -> Data:
    """Return 256 training and 128 test samples of four classes."""
    options = {"input_shape": [1, SIZE, SIZE], "classes": ["a", "b", "c", "d"], "mean": [0.3], "std": [0.25]}
    made = TaskSpec(name="classification", options={**options, **(task.options if task else {})})
    train, test = int(spec.options.get("train", 256)), int(spec.options.get("test", 128))
    return Data(spec, made, BlobSplit(train, 1) if train else None, BlobSplit(test, 2) if test else None)
