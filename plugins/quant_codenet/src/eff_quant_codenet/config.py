"""Options of quant_codenet. Imports no torch."""

from __future__ import annotations

from eff.method import Field, MethodConfig


class CoDeNetConfig(MethodConfig):
    """Options of quant_codenet; the defaults are the paper's or its code's. The network's are those of `codenet:1x`."""

    weight_bits: int = Field(4, ge=2, le=8, description="Bits of the weights, one scale per output channel.")
    act_bits: int = Field(8, ge=2, le=8, description="Bits of the activations, one scale per tensor.")
    stem_bits: int = Field(8, ge=2, le=8, description="Bits of the first convolution's weights.")
    percentile: bool = Field(
        False,
        description="Clip weights at the 0.1 and 99.9 percentiles of a channel (0.95 of min and max below 10 weights).",
    )
    ema_momentum: float = Field(0.99, ge=0, lt=1, description="Of the running ranges of the activations.")
    round_offsets: bool = Field(
        True,
        description="Round offsets to integers; straight-through in training. false: quantize them as activations.",
    )
    calibration_samples: int = Field(256, ge=1, description="Training samples that set the first ranges.")
    drops: tuple[int, ...] = Field((50, 70), description="Epochs from which the learning rate is a tenth.")
