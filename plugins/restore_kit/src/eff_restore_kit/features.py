"""Frozen features for perceptual and contrastive losses: VGG-19 (Simonyan and Zisserman, ICLR 2015).

The weights are not part of this package: a file in torchvision's layout (`vgg19-*.pth`) is read where
one is named. "random" gives an untrained network of a quarter of the width, which is a variant of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from eff.checkpoint import load_state, read_model_file
from eff.seeding import derive_seed

RANDOM = "random"
_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512)  # 0: max pooling
TAPS = (1, 6, 11, 20, 29)
"""Positions of relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1."""


class VGGFeatures(nn.Module):
    """The convolutions of VGG-19 up to relu5_1, frozen; takes images in [0, 1] as they are.

    Args:
        source: a file with VGG-19's weights, or "random".
    """

    def __init__(self, source: str):
        super().__init__()
        is_random = source == RANDOM
        layers: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            own = width // 4 if is_random else width
            layers += [nn.Conv2d(channels, own, 3, padding=1), nn.ReLU()]
            channels = own
        self.features = nn.Sequential(*layers)
        if is_random:
            generator = torch.Generator().manual_seed(derive_seed(0, "random VGG"))
            for layer in self.features:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        else:
            state = read_model_file(Path(source)).state
            kept = {key: value for key, value in state.items() if key in self.state_dict()}
            load_state(self, kept, source, "VGG-19")
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the five activations of images (N, 3, H, W)."""
        found = []
        for position, layer in enumerate(self.features):
            image = layer(image)
            if position in TAPS:
                found.append(image)
        return found
