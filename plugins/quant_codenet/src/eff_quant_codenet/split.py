"""A split of images with boxes, and the task that a data source makes of its splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eff.data import Batch, Data
from eff.data.classification import channel_statistics
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec

NO_OBJECT = -1


@dataclass(frozen=True)
class Objects:
    """The objects of one image."""

    boxes: Tensor
    """(M, 4) left, top, right, bottom in pixels."""
    labels: Tensor
    """(M,) int64."""


def clean(boxes: Tensor, height: float, width: float) -> tuple[Tensor, Tensor]:
    """Return boxes cut to the image, and which of them are left: (M, 4), (M,) bool."""
    limit = boxes.new_tensor([width, height, width, height])
    cut = torch.minimum(boxes.clamp(min=0), limit)
    return cut, ((cut[:, 2:] - cut[:, :2]) > 0).all(1)


class DetectionSplit:
    """Images of one shape with boxes.

    Args:
        image: index -> image (C, H, W), float32 in [0, 1].
        objects: of each image.
        shape: channels, height and width.
        mark: what the fingerprint hashes besides the boxes.
        flip: mirror half of the images when a batch is asked for with a generator.
        dropped: boxes that were left out because they lie outside the image or have no area.
    """

    def __init__(
        self, image: Callable[[int], Tensor], objects: Sequence[Objects], shape: tuple[int, int, int], mark: str,
        flip: bool = False, dropped: int = 0,
    ):  # fmt: skip
        self.image, self.objects, self.shape, self.flip, self.dropped = image, objects, shape, flip, dropped
        self._mark = mark
        self._most = max(1, *(len(item.labels) for item in objects)) if objects else 1

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.objects)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return image (N, C, H, W), boxes (N, M, 4) in pixels and label (N, M), -1 where there is no object."""
        chosen = list(indices)
        image = torch.stack([self.image(index) for index in chosen])
        boxes = torch.zeros(len(chosen), self._most, 4)
        label = torch.full((len(chosen), self._most), NO_OBJECT)
        for row, index in enumerate(chosen):
            item = self.objects[index]
            boxes[row, : len(item.labels)], label[row, : len(item.labels)] = item.boxes, item.labels
        if self.flip and generator is not None:
            mirrored = torch.rand(len(chosen), generator=generator) < 0.5
            image = torch.where(mirrored.view(-1, 1, 1, 1), image.flip(-1), image)
            turned = torch.stack(
                [self.shape[2] - boxes[..., 2], boxes[..., 1], self.shape[2] - boxes[..., 0], boxes[..., 3]], -1
            )
            boxes = torch.where((mirrored[:, None] & (label >= 0))[..., None], turned, boxes)
        return {"image": image, "boxes": boxes, "label": label}

    def fingerprint(self) -> str:
        """Return a hash of the boxes, the shape and what the source says of its images."""
        digest = hashlib.blake2b(repr((self.shape, self._mark)).encode(), digest_size=8)
        for item in self.objects:
            digest.update(item.boxes.numpy().tobytes() + item.labels.numpy().tobytes())
        return digest.hexdigest()


def make_data(
    spec: DataSpec, task: TaskSpec | None, classes: Sequence[str], splits: dict[str, DetectionSplit], seed: int
) -> Data:
    """Return the splits under the task "detection": what a model's file says stands over what the data says.

    Raises:
        DataError: the model is for another task, or there are no images.
    """
    if task is not None and task.name != "detection":
        raise DataError(f"data '{spec}' has boxes; the model's task is {task.name}, not detection")
    if not splits:
        raise DataError(f"data '{spec}': train=0 and test=0 leave nothing")
    first = next(iter(splits.values()))
    options = {"input_shape": list(first.shape), "classes": list(classes)}
    known = task.options if task is not None else {}
    if "mean" not in known and "train" in splits:
        mean, std = channel_statistics(splits["train"], seed)  # type: ignore[arg-type] # has shape, length and batches
        options |= {"mean": list(mean), "std": list(std)}
    return Data(spec, TaskSpec(name="detection", options={**options, **known}), **splits)
