"""Objects as points (Zhou et al., 2019, arXiv:1904.07850): targets, loss and decoding of a CenterNet head.

Y[c, p]   = max over the objects of class c of exp(-|p - p_k|^2 / (2 sigma_k^2)),  p_k the pixel of the centre
L_heat    = -1/N sum { (1 - P)^2 log P                  where Y = 1
                     { (1 - Y)^4 P^2 log(1 - P)         elsewhere
L         = L_heat + 0.1 L_size + L_centre               L1 at the pixels p_k
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.errors import DataError

SIZE_WEIGHT, CENTRE_WEIGHT = 0.1, 1.0
ALPHA, BETA = 2, 4
SMALLEST_PROBABILITY = 1e-4
MIN_OVERLAP = 0.7


class Targets(NamedTuple):
    """What a detector should output, in output pixels."""

    heatmap: Tensor
    """(N, C, H, W)."""
    image: Tensor
    """(K,) int64: the image of each object."""
    pixel: Tensor
    """(K,) int64: y W + x of its centre."""
    size: Tensor
    """(K, 2): width and height."""
    centre: Tensor
    """(K, 2): (x, y) of the centre within its pixel, in [0, 1)."""


class Detections(NamedTuple):
    """The best boxes of each image, best first."""

    boxes: Tensor
    """(N, top, 4): left, top, right, bottom in input pixels."""
    scores: Tensor
    """(N, top)."""
    labels: Tensor
    """(N, top) int64."""


def gaussian_radius(width: Tensor, height: Tensor, overlap: float = MIN_OVERLAP) -> Tensor:
    """Return how far corners may move so that the box still overlaps by `overlap` (CornerNet's three cases, the least).

    As in CenterNet's code, whose roots are divided by 2 and not by 2a: the radii are those that detectors are trained with.

    Args:
        width: in output pixels, any shape.
        height: like `width`.
        overlap: intersection over union, in (0, 1).
    """
    total, area = width + height, width * height
    inside = (total + (total**2 - 4 * area * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    smaller = (2 * total + (4 * total**2 - 16 * (1 - overlap) * area).clamp(min=0).sqrt()) / 2
    larger = (-2 * overlap * total + (4 * overlap**2 * total**2 + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(inside, smaller), larger)


def make_targets(boxes: Tensor, labels: Tensor, classes: int, height: int, width: int, stride: int) -> Targets:
    """Return the targets of a batch.

    Args:
        boxes: (N, M, 4) left, top, right, bottom in input pixels, inside the image.
        labels: (N, M) int64; -1 where there is no object.
        classes: number of classes.
        height: of the output.
        width: of the output.
        stride: input pixels per output pixel.

    Raises:
        DataError: a label is no class.
    """
    image, slot = (labels >= 0).nonzero(as_tuple=True)
    label, box = labels[image, slot], boxes[image, slot] / stride
    if len(label) and int(label.max()) >= classes:
        raise DataError(f"class {int(label.max())} is out of range; the detector has {classes} classes, from 0")
    size = box[:, 2:] - box[:, :2]
    middle = (box[:, :2] + box[:, 2:]) / 2
    whole = torch.minimum(middle.floor(), middle.new_tensor([width - 1, height - 1]))
    radius = gaussian_radius(*size.ceil().unbind(1)).floor().clamp(min=0)
    sigma = (2 * radius + 1) / 6
    rows = _bell(torch.arange(height, device=box.device), whole[:, 1], radius, sigma)
    columns = _bell(torch.arange(width, device=box.device), whole[:, 0], radius, sigma)
    bells = rows[:, :, None] * columns[:, None, :]
    heatmap = bells.new_zeros(len(labels) * classes, height * width)
    index = (image * classes + label)[:, None].expand(-1, height * width)
    heatmap.scatter_reduce_(0, index, bells.flatten(1), "amax")
    pixel = (whole[:, 1] * width + whole[:, 0]).long()
    return Targets(heatmap.view(len(labels), classes, height, width), image, pixel, size, middle - whole)


def _bell(positions: Tensor, middle: Tensor, radius: Tensor, sigma: Tensor) -> Tensor:
    """Return exp(-d^2 / (2 sigma^2)) within the radius, (K, len(positions))."""
    distance = positions - middle[:, None]
    return torch.exp(-(distance**2) / (2 * sigma[:, None] ** 2)) * (distance.abs() <= radius[:, None])


def heatmap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the penalty-reduced focal loss, 0-dim; without objects the sum of the negative term."""
    probability = logits.float().sigmoid().clamp(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    peak = target == 1
    positive = (probability.log() * (1 - probability) ** ALPHA)[peak].sum()
    negative = ((1 - probability).log() * probability**ALPHA * (1 - target) ** BETA)[~peak].sum()
    return -(positive + negative) / peak.sum().clamp(min=1)


def detection_loss(output: Tensor, targets: Targets) -> Tensor:
    """Return L for an output (N, classes + 4, H, W)."""
    classes = targets.heatmap.shape[1]
    loss = heatmap_loss(output[:, :classes], targets.heatmap)
    if not len(targets.pixel):
        return loss
    at = output[:, classes:].flatten(2)[targets.image, :, targets.pixel].float()
    return (
        loss + SIZE_WEIGHT * F.l1_loss(at[:, :2], targets.size) + CENTRE_WEIGHT * F.l1_loss(at[:, 2:], targets.centre)
    )


def decode(output: Tensor, classes: int, stride: int, top: int = 100) -> Detections:
    """Return the `top` best local maxima of the heatmaps as boxes; there is no suppression beyond the 3x3 maximum.

    Args:
        output: (N, classes + 4, H, W).
        classes: number of classes.
        stride: input pixels per output pixel.
        top: boxes per image; at most classes H W.
    """
    heat = output[:, :classes].float().sigmoid()
    heat = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
    n, _, height, width = heat.shape
    scores, index = heat.flatten(1).topk(min(top, heat[0].numel()), 1)
    labels, pixel = index // (height * width), index % (height * width)
    at = output[:, classes:].float().flatten(2).gather(2, pixel[:, None].expand(-1, 4, -1))
    x, y = pixel % width + at[:, 2], pixel // width + at[:, 3]
    half_width, half_height = at[:, 0].clamp(min=0) / 2, at[:, 1].clamp(min=0) / 2
    boxes = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], -1) * stride
    limit = boxes.new_tensor([width, height, width, height]) * stride
    return Detections(torch.minimum(boxes.clamp(min=0), limit), scores, labels)
