"""Macro spaces: convolutional networks whose widths and kernel sizes are searched, at their largest.

`conv_macro` is the toy space of TangleNAS's code (automl/TangleNAS): four searched convolutions, a fifth with
a fixed output, three hidden linear layers; candidate widths a quarter, half and all of the channels, kernels 3, 5
and 7, 3^8 = 6561 networks. `digits_macro` is one for 8 x 8 images: three convolutions and a linear layer.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from eff.schemas import Schema


class MacroOptions(Schema):
    """Options of nas:conv_macro and nas:digits_macro."""

    num_classes: int = Field(10, ge=1)
    in_channels: int = Field(3, ge=1)
    image_size: int = Field(32, ge=4, description="Height and width of the images.")
    widths: tuple[int, ...] = Field((32, 64, 128, 256), min_length=1, description="Channels of the convolutions.")
    kernel: int = Field(7, ge=1, description="Kernel size of all convolutions; odd.")
    pools: tuple[int, ...] = Field((2, 3), description="Convolutions, from 1, that are followed by a 2 x 2 maximum.")
    tail: int = Field(256, ge=0, description="Channels of one more convolution, which is not searched; 0: none.")
    hidden: tuple[int, ...] = Field((256, 128, 64), description="Widths of the linear layers before the last.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout of whole channels after conv3 and the last one.")

    @field_validator("widths", "pools", "hidden", mode="before")
    @classmethod
    def _list_of_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part for part in value.split(",") if part)
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _shapes_fit(self) -> MacroOptions:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.side < 1:
            raise ValueError(f"image_size {self.image_size} is too small for these convolutions; use nas:digits_macro")
        return self

    @property
    def side(self) -> int:
        """Height and width of the last feature maps."""
        side = self.image_size // 2 ** len(self.pools)
        return side - 2 if self.tail and self.kernel >= 5 else side  # the tail pads one pixel less on each side


class DigitsMacroOptions(MacroOptions):
    """Options of nas:digits_macro."""

    in_channels: int = Field(1, ge=1)
    image_size: int = Field(8, ge=4, description="Height and width of the images.")
    widths: tuple[int, ...] = Field((16, 16, 16), min_length=1, description="Channels of the convolutions.")
    kernel: int = Field(5, ge=1, description="Kernel size of all convolutions; odd.")
    pools: tuple[int, ...] = Field((2,), description="Convolutions, from 1, that are followed by a 2 x 2 maximum.")
    tail: int = Field(0, ge=0, description="Channels of one more convolution, which is not searched; 0: none.")
    hidden: tuple[int, ...] = Field((), description="Widths of the linear layers before the last.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of whole channels after conv3 and the last one.")


class MacroNet(nn.Module):
    """Convolutions with bias and ReLU, some followed by a maximum over 2 x 2, then linear layers."""

    searchable: tuple[str, ...]
    """Layers whose widths and kernels make the space, where a search is not told otherwise."""

    def __init__(self, options: MacroOptions):
        super().__init__()
        kernel, before = options.kernel, options.in_channels
        steps: list[tuple[str, nn.Module]] = []
        for index, width in enumerate(options.widths, start=1):
            steps += [
                (f"conv{index}", nn.Conv2d(before, width, kernel, padding=kernel // 2)),
                (f"relu{index}", nn.ReLU()),
            ]
            if index == 3 and options.dropout:
                steps.append(("drop3", nn.Dropout2d(options.dropout)))
            if index in options.pools:
                steps.append((f"pool{index}", nn.MaxPool2d(2)))
            before = width
        if options.tail:
            padding = kernel // 2 - (kernel >= 5)
            steps += [("tail", nn.Conv2d(before, options.tail, kernel, padding=padding)), ("tail_relu", nn.ReLU())]
            steps += [("tail_drop", nn.Dropout2d(options.dropout))] if options.dropout else []
            before = options.tail
        steps.append(("flatten", nn.Flatten()))
        before *= options.side**2
        for index, width in enumerate(options.hidden, start=1):
            steps += [(f"fc{index}", nn.Linear(before, width)), (f"fc_relu{index}", nn.ReLU())]
            before = width
        steps.append(("head", nn.Linear(before, options.num_classes)))
        self.searchable = tuple(f"conv{index}" for index in range(1, len(options.widths) + 1))
        self.names = [name for name, _ in steps]
        for name, module in steps:
            self.add_module(name, module)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, image_size, image_size)."""
        x = image
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x
