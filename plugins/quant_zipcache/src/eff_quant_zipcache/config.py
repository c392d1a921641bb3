"""Options of quant_zipcache. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

Bits = Literal[2, 4, 8]
Scheme = Literal["channel", "token", "channel_separable"]


class ZipCacheConfig(MethodConfig):
    """Options of quant_zipcache; the defaults are the paper's, with the corrections that the README lists."""

    bits_salient: Bits = Field(4, description="Bit width of salient tokens.")
    bits_other: Bits = Field(2, description="Bit width of the other tokens; at most bits_salient.")
    unsalient_ratio_k: float = Field(0.4, ge=0, le=1, description="Share of tokens whose keys have bits_other.")
    unsalient_ratio_v: float = Field(0.4, ge=0, le=1, description="Share of tokens whose values have bits_other.")
    key_scheme: Scheme = Field(
        "channel", description="What shares a range in keys: a channel, a token, or a token after division by c."
    )
    value_scheme: Scheme = Field("channel_separable", description="The same for values.")
    metric: Literal["normalized", "accumulated"] = Field(
        "normalized", description="Salience of a token: mean or sum of the attention it receives."
    )
    nnz: Literal["probe", "full"] = Field(
        "probe", description="Normalise by the probes that see a token, or by all queries that do (released code)."
    )
    probe_recent: float = Field(0.05, ge=0, le=1, description="Share of the queries that are probes: the newest.")
    probe_random: float = Field(
        0.05, ge=0, le=1, description="Share of the queries that are probes: drawn from earlier ones."
    )
    streaming_gap: int = Field(100, ge=1, description="New tokens kept in float before they are compressed.")
    requantize_old: bool = Field(False, description="Quantize the whole cache anew each time (released code).")
    split_per_head: bool = Field(True, description="Salient tokens of each key/value head; false: of their mean.")
    seed: int = Field(0, ge=0, description="Of the random probes.")
    prefill: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of a text read at once when a model is evaluated; the rest goes through the cache.",
    )

    @model_validator(mode="after")
    def _fits(self) -> ZipCacheConfig:
        if self.bits_other > self.bits_salient:
            raise ValueError(f"bits_other {self.bits_other} is above bits_salient {self.bits_salient}")
        if self.probe_recent + self.probe_random <= 0:
            raise ValueError("probe_recent and probe_random are both 0; there would be no probe")
        return self
