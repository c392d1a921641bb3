"""The paper's claims at desk scale: small networks for scikit-learn's digits, and EfficientNet-Lite0's filters.

Five settings of one network (3x3 convolutions with batch norm, 16, 32 and 32 channels) per seed: trained, four
times as wide, on shuffled labels, on adversarial images (PGD, 5 steps, 0.1 in the maximum norm), and
untrained. SGD with momentum 0.9 and weight decay 5e-4, cosine from 0.05, 15 epochs, batches of 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.claims import ClaimRun
from eff.data import load_data
from eff.models import ModelRequest, open_model
from eff.seeding import seed_everything
from eff.session import Plugins
from eff_eval_filter_db.basis import fit_basis
from eff_eval_filter_db.config import FilterDBConfig
from eff_eval_filter_db.drift import Projector, measure_drift
from eff_eval_filter_db.layers import Layer, layers_of_model
from eff_eval_filter_db.quality import Quality, layer_quality

CONFIG = FilterDBConfig()
SETTINGS = ("normal", "wide", "shuffled", "adversarial", "untrained")
MANY = 256
"""Filters of a layer from which its entropy is compared."""
OTHER_SEED = 1000
EPOCHS, BATCH, LR, DECAY = 15, 64, 0.05, 5e-4
EPSILON, ATTACK_STEPS = 0.1, 5


def degeneration_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return entropies, sparsity and drifts per seed."""
    rows = [_one_seed(seed) for seed in run.log.track(run.seeds, "degeneration_digits")]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _one_seed(seed: int) -> dict[str, float]:
    nets = {name: make(name, seed) for name in SETTINGS}
    layers = {name: layers_of_model(net, name) for name, net in nets.items()}
    layers["again"] = layers_of_model(make("normal", seed + OTHER_SEED), "again")
    scores = {name: [layer_quality(layer, CONFIG) for layer in found] for name, found in layers.items()}
    drift = _drifts(layers, seed)
    between_seeds = drift["normal", "again"]
    between = [drift["normal", name] for name in ("shuffled", "adversarial", "untrained")]
    compared = [i for i, layer in enumerate(layers["normal"]) if layer.count >= MANY]
    changes = [scores["normal"][i].entropy - scores["untrained"][i].entropy for i in compared]
    sparsity = {name: _mean([quality.sparsity for quality in scores[name]]) for name in SETTINGS}
    clean = {name: _mean([quality.clean_entropy or 0.0 for quality in scores[name]]) for name in SETTINGS}
    # Entropy grows with the number of filters; over T(n) networks of different width can be compared.
    over_noise = {name: _mean([quality.normalised_entropy or 0.0 for quality in scores[name]]) for name in SETTINGS}
    return {
        "untrained_entropy_minus_threshold": min(_above_noise(quality) for quality in scores["untrained"]),
        "untrained_sparsity": sparsity["untrained"],
        "largest_entropy_change": max(changes),
        "wide_degeneration": max(sparsity["wide"] - sparsity["normal"], clean["normal"] - clean["wide"]),
        "drift_between_seeds": between_seeds,
        "drift_between_settings": _mean(between),
        "drift_ratio_trained_untrained": drift["normal", "untrained"] / between_seeds,
        **{f"{name}_sparsity": sparsity[name] for name in ("normal", "wide", "shuffled", "adversarial")},
        **{f"{name}_clean_entropy": clean[name] for name in SETTINGS},
        **{f"{name}_normalised_entropy": over_noise[name] for name in SETTINGS},
        **{f"drift_normal_{name}": drift["normal", name] for name in ("wide", "shuffled", "adversarial", "untrained")},
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _above_noise(quality: Quality) -> float:
    assert quality.threshold is not None  # 3x3 filters
    return quality.entropy - quality.threshold


def _drifts(layers: dict[str, list[Layer]], seed: int) -> dict[tuple[str, str], float]:
    """Return D between equally many filters of each pair, on the common basis of all."""
    everything = [layer for found in layers.values() for layer in found]
    basis = fit_basis(everything, CONFIG.kernel**2)
    projector = Projector(basis, everything, CONFIG.bins, CONFIG.scale, CONFIG.dtype)
    drift = measure_drift(layers, projector, np.random.default_rng(seed))
    return {
        (first, second): float(drift.matched[i, j])
        for i, first in enumerate(drift.names)
        for j, second in enumerate(drift.names)
    }


def make(setting: str, seed: int) -> nn.Module:
    """Return the network of one setting, trained where that says so."""
    data = load_data(f"digits?seed={seed % OTHER_SEED}")
    split = data.split("train")
    batch = split.batch(range(len(split)))
    images, labels = batch["image"], batch["label"]
    seed_everything(seed, f"eval_filter_db/{setting}")
    network = DigitsNet(64 if setting == "wide" else 16)
    if setting == "untrained":
        return network
    if setting == "shuffled":
        labels = labels[torch.randperm(len(labels))]
    return train(network, images, labels, adversarial=setting == "adversarial")


class DigitsNet(nn.Sequential):
    """Three 3x3 convolutions of `width`, 2 and 2 times `width` channels with batch norm and ReLU; 10 classes."""

    def __init__(self, width: int):
        layers: list[nn.Module] = []
        for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10))


def train(network: nn.Module, images: Tensor, labels: Tensor, adversarial: bool) -> nn.Module:
    """Train on images (N, 1, 8, 8) in [0, 1], or on their worst neighbours."""
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=DECAY)
    per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * per_epoch)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for place in range(per_epoch):
            chosen = order[place * BATCH : (place + 1) * BATCH]
            x, y = images[chosen], labels[chosen]
            if adversarial:
                x = attacked(network, x, y)
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            schedule.step()
    return network


def attacked(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return images within EPSILON of `x` that raise the loss (projected gradient, Madry et al., 2018)."""
    worst = (x + EPSILON * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(ATTACK_STEPS):
        worst.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(worst), y), worst)
        moved = worst.detach() + 2.5 * EPSILON / ATTACK_STEPS * gradient.sign()
        worst = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    return worst


def imagenet_basis(run: ClaimRun) -> dict[str, list[float]]:
    """Return the share of variance (%) of the first component: ImageNet filters, and as many Gaussian ones."""
    request = ModelRequest("zoo:efficientnet_lite0?pretrained=true", needs_data=False, needs_task=False)
    layers = layers_of_model(open_model(request, Plugins()).model, "efficientnet_lite0")
    first = 100.0 * float(fit_basis(layers, 9).ratios[0])
    count = sum(layer.count for layer in layers)
    gaussian = []
    for seed in run.seeds:
        draw = np.random.default_rng(seed).standard_normal((count, 1, 3, 3))
        layer = Layer("gaussian", "conv", 0, 0.0, (count, 1), 1, lambda draw=draw: draw)
        gaussian.append(100.0 * float(fit_basis([layer], 9).ratios[0]))
    bound = 100.0 * (1 / 9 + 3 / count**0.5)
    return {
        "efficientnet_lite0": [first] * len(run.seeds),
        "gaussian": gaussian,
        "gaussian_upper_bound": [bound] * len(run.seeds),
    }
