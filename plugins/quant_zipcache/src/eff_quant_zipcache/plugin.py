"""Declares quant_zipcache to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics
from eff_quant_zipcache.config import ZipCacheConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import Artifact, ExportTarget


class ZipCache(Method[ZipCacheConfig]):
    """ZipCache: the key/value cache of a language model in few bits, more of them for salient tokens."""

    card: ClassVar = Card(
        title="ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
        authors=("Yefei He", "Luoming Zhang", "Weijia Wu", "Jing Liu", "Hong Zhou", "Bohan Zhuang"),
        venue="NeurIPS",
        year=2024,
        paper="arXiv:2405.14256",
        url="https://arxiv.org/abs/2405.14256",
        tasks=("language_modeling",),
        formats=("kvcache",),
        composes_with=("quantized weights", "grouped-query attention", "adapters"),
        conflicts_with=(),
        notes="Weights stay as they are; the cache is compressed while a text is read and written.",
    )
    claims: ClassVar = (
        Claim(
            id="quantizers",
            statement="Dividing channels by sqrt(max) makes 4-bit tokens 5 times as exact, and no worse than groups of 32.",
            run="eff_quant_zipcache.claims:quantizers",
            checks=(
                Check(left="token_over_separable", right=5.0),
                Check(left="separable_4bit", right="group32_4bit", relation="at_most"),
                Check(left="separable_parameters", right="group32_parameters", relation="at_most"),
            ),
            paper="Parameters of a cache: 2BHLD/n by groups of n, HD + 2BL channel-separable.",
            unit="MSE",
            units={"separable": "x", "parameters": ""},
            seeds=(0, 1, 2),
            minutes=0.1,
        ),
        Claim(
            id="planted",
            statement="Attention averaged over the probes that see a token finds planted tokens that its sum misses.",
            run="eff_quant_zipcache.claims:planted",
            checks=(
                Check(left="probes", right="accumulated", margin=0.2),
                Check(left="probes", right="probes_full", margin=0.0),
            ),
            paper="LLaMA3-8B on GSM8k at 4.69x: 53.75 % with the averaged, 35.48 % with the summed score (MiKV); second-hand.",
            unit="recall",
            seeds=tuple(range(20)),
            minutes=0.1,
        ),
        Claim(
            id="language",
            statement="At equal bytes averaged scores keep a language model nearer the float cache than sums, both than 2 bits.",
            run="eff_quant_zipcache.claims:language",
            checks=(
                Check(left="normalized", right="accumulated", relation="at_most"),
                Check(left="accumulated", right="bits2", relation="at_most"),
                Check(left="bits4", right="normalized", relation="at_most"),
            ),
            paper="As for retrieval; the paper reports no divergence.",
            unit="KL, 1/1000 nat",
            units={"perplexity": "", "ratio": "x"},
            seeds=(0, 1, 2),
            minutes=2,
        ),
        Claim(
            id="retrieval",
            statement="At equal bytes averaged scores retrieve at least as many values as sums, and both more than 2 bits.",
            run="eff_quant_zipcache.claims:retrieval",
            checks=(
                Check(left="fp", right=80.0),  # a model that does not retrieve says nothing about its cache
                Check(left="accumulated", right="bits2"),
                Check(left="normalized", right="accumulated"),
                Check(left="fp", right="normalized"),
                Check(left="normalized_bytes", right="accumulated_bytes", relation="at_most"),
            ),
            paper="Mistral-7B on GSM8k: 0.38 points lost at a ratio of 4.98 (abstract).",
            unit="% exact",
            units={"bytes": "B", "ratio": "x"},
            seeds=(0, 1, 2),
            minutes=10,
        ),
    )
    sample: ClassVar = Sample(
        model="zoo:llama_tiny?dim=16&heads=2&kv_heads=1&hidden=32",
        data="corpus?length=32&train=4&test=4",
        options={"streaming_gap": 8},
    )

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Give the model a compressed cache."""
        from eff_quant_zipcache.model import compress

        return compress(model, self.config)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report bytes, ratio, distance to the float cache and how well probes find salient tokens."""
        from eff_quant_zipcache.model import Compressed

        if data is None or not isinstance(model, Compressed):
            return Metrics()
        from eff_quant_zipcache.report import describe

        return describe(model, data, run)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the compressed cache of a text; refuse formats that a cache of Python objects does not fit."""
        from eff.errors import UnsupportedModelError

        if target.format in ("onnx", "pt2"):
            raise UnsupportedModelError(
                f"quant_zipcache: a compressed cache is no part of a {target.format} graph; export the model it was applied to"
            )
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_zipcache.export import write_cache

        return describe_artifact(target.path, target.format, write_cache(model, target.path, run))
