"""Average precision of boxes, as COCO defines it: 101 recall points, the mean over classes with objects.

A detection is right where its overlap with an object that no better detection has taken is at least the threshold; AP50
has the threshold 0.5, AP is the mean over 0.5, 0.55, ..., 0.95.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def overlaps(a: Floats, b: Floats) -> Floats:
    """Return the intersection over union of boxes (A, 4) and (B, 4): left, top, right, bottom; (A, B)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a, area_b = (np.prod(np.clip(part[:, 2:] - part[:, :2], 0, None), axis=1) for part in (a, b))
    union = area_a[:, None] + area_b[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match(boxes: Floats, objects: Floats, thresholds: Floats = THRESHOLDS) -> NDArray[np.bool_]:
    """Return which detections of one class in one image are right, (thresholds, detections).

    Args:
        boxes: (D, 4), best first.
        objects: (G, 4).
        thresholds: of the overlap.
    """
    right = np.zeros((len(thresholds), len(boxes)), dtype=bool)
    if not len(boxes) or not len(objects):
        return right
    overlap = overlaps(boxes, objects)
    taken = np.zeros((len(thresholds), len(objects)), dtype=bool)
    levels = np.arange(len(thresholds))
    for index in np.flatnonzero(overlap.max(1) >= thresholds[0]):  # the others are wrong at every threshold
        free = np.where(taken, -1.0, overlap[index])
        best = free.argmax(1)
        hit = free[levels, best] >= thresholds
        right[hit, index] = True
        taken[levels[hit], best[hit]] = True
    return right


def average_precision(scores: Floats, right: NDArray[np.bool_], objects: int) -> Floats:
    """Return the area under the interpolated precision-recall curve at each threshold.

    Args:
        scores: (D,) of all detections of a class.
        right: (thresholds, D).
        objects: how many there are, above 0.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[:, order], axis=1)
    precision = hits / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros(len(right))
    for level, (recall, curve) in enumerate(zip(hits / objects, precision, strict=True)):
        at = np.searchsorted(recall, RECALLS, side="left")
        found[level] = np.append(curve, 0.0)[np.minimum(at, len(curve))].mean()
    return found


class PrecisionMeter:
    """Collects detections and objects by class."""

    def __init__(self, classes: int):
        self.scores: list[list[Floats]] = [[] for _ in range(classes)]
        self.right: list[list[NDArray[np.bool_]]] = [[] for _ in range(classes)]
        self.objects = [0] * classes

    def add(self, found: tuple[Floats, Floats, NDArray[np.int64]], boxes: Floats, labels: NDArray[np.int64]) -> None:
        """Take in one image: (boxes, scores, labels) found, best first, and what is there."""
        found_boxes, scores, found_labels = found
        for label in range(len(self.objects)):
            mine = found_labels == label
            there = boxes[labels == label]
            self.objects[label] += len(there)
            self.scores[label].append(scores[mine])
            self.right[label].append(match(found_boxes[mine], there))

    def by_class(self) -> dict[int, Floats]:
        """Return the precision at each threshold, by class that has objects."""
        return {
            label: average_precision(
                np.concatenate(self.scores[label]), np.concatenate(self.right[label], axis=1), count
            )
            for label, count in enumerate(self.objects)
            if count
        }
