"""Model sources `codenet:NAME`: options, presets, and the replacement of another network's convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from eff.errors import ModelError, did_you_mean
from eff.models import build_from_library, parse_source
from eff.seeding import derive_seed
from eff_quant_codenet.deform import DeformConv2d
from eff_quant_codenet.network import CoDeNet, Deformation, Layout
from eff_quant_kit.layers import replace_module

if TYPE_CHECKING:
    from eff.run import Run
    from eff.schemas import ModelSpec

WIDTHS = {1: (24, 116, 232, 464, 1024), 2: (24, 244, 488, 976, 2153)}


def _split(value: object) -> object:
    """Take "8,16,32" apart; 8 alone is a list too."""
    if isinstance(value, int):
        return [value]
    return value.split(",") if isinstance(value, str) else value


Numbers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


class DeformOptions(BaseModel):
    """How the deformable convolutions sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deform: Literal["none", "full", "bound", "square"] = "square"
    kernel: int = Field(3, ge=1, le=15)
    offset_bound: int = Field(8, ge=1, le=64)
    bound_mode: Literal["repo", "paper"] = "repo"
    round_offsets: bool = False
    num_classes: int = Field(ge=1)
    in_channels: int = Field(3, ge=1)


class CoDeNetOptions(DeformOptions):
    """Options of `codenet:1x` and its like."""

    width: Literal[1, 2] | Numbers = Field(1, union_mode="left_to_right")
    blocks: Numbers | None = None
    decoder: Numbers | None = None
    head: int = Field(64, ge=1)
    depthwise: bool = True
    mix_first: bool = False
    stem: Literal["stride4", "maxpool"] = "stride4"

    @model_validator(mode="after")
    def _fits(self) -> CoDeNetOptions:
        stages = len(self.channels) - 2
        if stages < 1:
            raise ValueError(f"width needs at least 3 numbers (stem, stages, last), got {len(self.channels)}")
        if odd := [width for width in self.channels[1:-1] if width % 2]:
            raise ValueError(f"width: stages are split in halves, so {odd[0]} must be even")
        for name in ("blocks", "decoder"):
            given = getattr(self, name)
            if given is not None and len(given) != stages:
                raise ValueError(f"{name} has {len(given)} numbers for {stages} stages")
        if stages > 3 and (self.blocks is None or self.decoder is None):
            raise ValueError(f"width names {stages} stages; name blocks and decoder too")
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        """Widths of stem, stages and last convolution."""
        return WIDTHS[self.width] if isinstance(self.width, int) else self.width

    def layout(self) -> Layout:
        """Return the widths; a shallower network has the last blocks of the decoder."""
        stages = len(self.channels) - 2
        base = Layout()
        blocks, decoder = self.blocks or base.blocks[:stages], self.decoder or base.decoder[-stages:]
        return Layout(self.channels, blocks, decoder, self.head, self.stem, self.mix_first)

    def deformation(self) -> Deformation:
        """Return how the decoder samples."""
        return Deformation(
            self.deform, self.depthwise, self.kernel, self.offset_bound, self.bound_mode, self.round_offsets
        )


class DeformedOptions(DeformOptions):
    """Options of `codenet:deformed`: another network with some convolutions replaced."""

    base: str
    layers: Names = Field(min_length=1)


PRESETS: dict[str, dict[str, Any]] = {
    "1x": {"width": 1},
    "2x": {"width": 2},
    "small": {"width": (16, 32, 64, 64), "blocks": (1, 1), "decoder": (48, 32), "head": 32},
    "deformed": {},
}


def build(spec: ModelSpec, run: Run) -> nn.Module:
    """Return the detector that `codenet:NAME` names; initial weights are a function of the run's seed and the source.

    Raises:
        ModelError: an unknown name or option, or values that do not fit.
    """
    if spec.name not in PRESETS:
        raise ModelError(
            f"{spec.source}: there is no such model{did_you_mean(spec.name, PRESETS)}; known: {', '.join(PRESETS)}"
        )
    kind = DeformedOptions if spec.name == "deformed" else CoDeNetOptions
    known = {key: value for key, value in run.task.model_options().items() if key in kind.model_fields}
    try:
        options = kind.model_validate({**PRESETS[spec.name], **known, **spec.options})
    except ValidationError as error:
        raise ModelError(f"{spec.source}: {_fault(kind, error)}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"build_model/{spec.source}"))
        if isinstance(options, DeformedOptions):
            return _deformed(options, run)
        assert isinstance(options, CoDeNetOptions)
        return CoDeNet(options.num_classes, options.in_channels, options.layout(), options.deformation())


def _fault(kind: type[BaseModel], error: ValidationError) -> str:
    item = error.errors()[0]
    if not item["loc"]:
        return item["msg"].removeprefix("Value error, ")
    name = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        fields = list(kind.model_fields)
        return f"option '{name}' is unknown{did_you_mean(name, fields)}; options are {', '.join(fields)}"
    if item["type"] == "missing":
        return f"option '{name}' is missing; write ?{name}=..."
    return f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _deformed(options: DeformedOptions, run: Run) -> nn.Module:
    base = parse_source(options.base)
    model = build_from_library(base, run)
    if model is None:
        raise ModelError(f"codenet:deformed: base '{options.base}' must be package.module:factory")
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name in options.layers:
        if name not in convolutions:
            raise ModelError(
                f"codenet:deformed: '{name}' is no convolution of {options.base}{did_you_mean(name, convolutions)}"
            )
        replace_module(model, name, _replacement(name, convolutions[name], options))
    return model


def _replacement(name: str, conv: nn.Conv2d, options: DeformedOptions) -> DeformConv2d:
    side, stride = conv.kernel_size[0], conv.stride[0]
    plain = conv.dilation == (1, 1) and conv.padding == (side // 2, side // 2) and conv.stride == (stride, stride)
    if conv.kernel_size != (options.kernel, options.kernel) or not plain:
        raise ModelError(
            f"codenet:deformed: '{name}' is no {options.kernel}x{options.kernel} convolution with padding "
            f"{options.kernel // 2} and dilation 1: {conv}"
        )
    return DeformConv2d(
        conv.in_channels, conv.out_channels, options.deform, groups=conv.groups, kernel=side, stride=stride,
        offset_bound=options.offset_bound, bound_mode=options.bound_mode, round_offsets=options.round_offsets,
        bias=conv.bias is not None,
    )  # fmt: skip
