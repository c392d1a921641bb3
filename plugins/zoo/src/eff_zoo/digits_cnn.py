"""A CNN for the 8 x 8 digits of scikit-learn: large enough to learn them, small enough to train in seconds.

    image (1, 8, 8) -> conv 8 -> conv 16 -> conv 16 -> largest of each quarter (16, 2, 2) -> linear

No paper; each convolution is 3 x 3 without bias, followed by batch normalisation and ReLU.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from eff_zoo.options import ZooOptions


class DigitsCNNOptions(ZooOptions):
    """Options of zoo:digits_cnn."""

    in_channels: int = Field(1, ge=1, description="Channels of the images; unset: the task's.")
    width: int = Field(8, ge=1, description="Channels of the first convolution; the others have twice as many.")


class DigitsCNN(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self, options: DigitsCNNOptions):
        super().__init__()
        narrow, wide = options.width, 2 * options.width
        self.conv1 = nn.Conv2d(options.in_channels, narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu3 = nn.ReLU()
        self.pool = nn.AdaptiveMaxPool2d(2)
        self.linear = nn.Linear(4 * wide, options.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, H, W)."""
        features = self.relu1(self.bn1(self.conv1(image)))
        features = self.relu2(self.bn2(self.conv2(features)))
        features = self.relu3(self.bn3(self.conv3(features)))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits
