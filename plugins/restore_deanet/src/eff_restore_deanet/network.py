"""DEA-Net (section III-D; the published code where the paper leaves open). Widths d, 2d, 4d, d = 32:

    e1 = blocks(conv(x));  d2 = relu(conv/2(e1));  e2 = blocks(conv(d2));  d3 = relu(conv/2(e2))
    m  = attention blocks(conv(d3))
    u2 = blocks(relu(deconv*2(fusion(d3, m))));  u1 = blocks(relu(deconv*2(fusion(d2, u2))));  out = conv(u1)

Fused are the features right after down-sampling, before the level's own convolutions. No residual from
the input to the output.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from eff.errors import DataError
from eff_restore_deanet.attention import CGAFusion, ContentGuidedAttention
from eff_restore_deanet.deconv import DEConv
from eff_restore_deanet.published import own_name

MULTIPLE = 4
"""Two halvings: sides must be multiples of this."""
SMALLEST = 16
"""The 7 x 7 convolutions mirror 3 pixels at a quarter of the side."""


class DEANetOptions(BaseModel):
    """Options of `deanet:base`, `deanet:small` and `deanet:tiny`; the defaults are base, the paper's network."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    in_channels: int = Field(3, ge=3, le=3, description="RGB.")
    base_dim: int = Field(32, ge=8, multiple_of=8, description="Width d of the first level.")
    blocks1: int = Field(4, ge=1, description="DEBlocks on each side of level 1.")
    blocks2: int = Field(4, ge=1, description="DEBlocks on each side of level 2.")
    blocks3: int = Field(8, ge=1, description="DEABlocks of level 3.")
    reduction: int = Field(8, ge=1, description="Reduction of the attention in level 3; divides 4d.")
    fusion_reduction: tuple[int, int] = Field((8, 4), description="Reduction in the fusions of level 3 and 2.")
    branches: str = Field("chva", description="Difference branches of the DEConvs; none: plain convolutions.")
    attention: bool = Field(True, description="Content-guided attention; false: identity maps and plain sums.")
    double_sigmoid: bool = Field(True, description="The published code's second sigmoid in the fusions.")

    @field_validator("branches")
    @classmethod
    def _known_branches(cls, value: str) -> str:
        if value != "none" and (not value or set(value) - set("chva") or len(set(value)) < len(value)):
            raise ValueError("branches must be letters of chva, each once, or none")
        return value

    @model_validator(mode="after")
    def _reductions_divide(self) -> DEANetOptions:
        pairs = ((self.reduction, 4), (self.fusion_reduction[0], 4), (self.fusion_reduction[1], 2))
        for reduction, times in pairs:
            if reduction < 1 or times * self.base_dim % reduction:
                raise ValueError(f"a reduction of {reduction} does not divide {times * self.base_dim} channels")
        return self


SIZES = {
    "base": {},
    "small": {"base_dim": 16, "blocks1": 2, "blocks2": 2, "blocks3": 4},
    "tiny": {"base_dim": 8, "blocks1": 1, "blocks2": 1, "blocks3": 2},
}


class DEBlock(nn.Module):
    """y = conv(relu(DEConv(x)) + x) + x; with attention r * W(r) + x for r = conv(relu(DEConv(x)) + x).

    Args:
        channels: of x and y.
        branches: of the DEConv, or "none" for a plain convolution.
        attention: the map W, or None.
    """

    def __init__(self, channels: int, branches: str, attention: nn.Module | None = None):
        super().__init__()
        self.conv1 = (
            nn.Conv2d(channels, channels, 3, padding=1) if branches == "none" else DEConv(channels, branches=branches)
        )
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) of `x` of that shape."""
        r = self.conv2(self.relu(self.conv1(x)) + x)
        if self.attention is not None:
            r = r * self.attention(r)
        out: Tensor = r + x
        return out


class DEANet(nn.Module):
    """The network; takes hazy RGB images in [0, 1], gives clear ones, not clamped."""

    own_name = staticmethod(own_name)
    """Names of published weights -> names here; what opens a model file asks for it."""

    def __init__(self, options: DEANetOptions):
        super().__init__()
        d = options.base_dim
        self.task_options = {"multiple": MULTIPLE, "smallest": SMALLEST}

        def blocks(channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(DEBlock(channels, options.branches) for _ in range(count)))

        def attention() -> nn.Module | None:
            return ContentGuidedAttention(4 * d, options.reduction) if options.attention else None

        def fusion(channels: int, reduction: int) -> CGAFusion:
            return CGAFusion(channels, reduction, options.double_sigmoid, options.attention)

        self.stem = nn.Conv2d(3, d, 3, padding=1)
        self.encoder1 = blocks(d, options.blocks1)
        self.down2 = nn.Conv2d(d, 2 * d, 3, stride=2, padding=1)
        self.enter2 = nn.Conv2d(2 * d, 2 * d, 3, padding=1)
        self.encoder2 = blocks(2 * d, options.blocks2)
        self.down3 = nn.Conv2d(2 * d, 4 * d, 3, stride=2, padding=1)
        self.enter3 = nn.Conv2d(4 * d, 4 * d, 3, padding=1)
        self.middle = nn.Sequential(*(DEBlock(4 * d, options.branches, attention()) for _ in range(options.blocks3)))
        self.fusion3 = fusion(4 * d, options.fusion_reduction[0])
        self.up2 = nn.ConvTranspose2d(4 * d, 2 * d, 3, stride=2, padding=1, output_padding=1)
        self.decoder2 = blocks(2 * d, options.blocks2)
        self.fusion2 = fusion(2 * d, options.fusion_reduction[1])
        self.up1 = nn.ConvTranspose2d(2 * d, d, 3, stride=2, padding=1, output_padding=1)
        self.decoder1 = blocks(d, options.blocks1)
        self.head = nn.Conv2d(d, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        """Return (N, 3, H, W) of `image` (N, 3, H, W); H and W multiples of 4, at least 16.

        Raises:
            DataError: the image is none that the network takes.
        """
        check_image(image)
        e1 = self.encoder1(self.stem(image))
        d2 = self.relu(self.down2(e1))
        d3 = self.relu(self.down3(self.encoder2(self.enter2(d2))))
        m = self.middle(self.enter3(d3))
        u2 = self.decoder2(self.relu(self.up2(self.fusion3(d3, m))))
        u1 = self.decoder1(self.relu(self.up1(self.fusion2(d2, u2))))
        out: Tensor = self.head(u1)
        return out


def check_image(image: Tensor) -> None:
    """Raise when DEA-Net cannot take `image`.

    Raises:
        DataError: not RGB, not floating point, too small, or no multiple of 4.
    """
    height, width = image.shape[-2:]
    if image.ndim != 4 or image.shape[1] != 3:
        raise DataError(f"DEA-Net takes RGB images (N, 3, H, W), got {tuple(image.shape)}; leave out transparency")
    if not image.is_floating_point():
        raise DataError(f"DEA-Net takes floating-point images in [0, 1], got {image.dtype}; divide by 255")
    if height < SMALLEST or width < SMALLEST:
        raise DataError(f"DEA-Net takes sides of at least {SMALLEST} pixels, got {height}x{width}")
    if height % MULTIPLE or width % MULTIPLE:
        raise DataError(f"DEA-Net takes sides that are multiples of {MULTIPLE}, got {height}x{width}; mirror the edges")
