"""What is measured of a tokenizer: use of the codebook, rate, distance of features; pictures and the token file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eff.checkpoint import header_metadata
from eff.data import Data, Split, move_batch, ordered_batches
from eff.errors import RequestError
from eff.exporting import make_header
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_quant_kit.diffusion.frechet import frechet_distance
from eff_quant_kit.diffusion.pictures import draw_samples
from eff_quant_vqgan_lc.config import VQGANLCConfig
from eff_quant_vqgan_lc.features import FrozenFeatures
from eff_quant_vqgan_lc.model import PLUGIN, Tokenizer
from eff_quant_vqgan_lc.usage import Usage

BATCH = 64


@torch.no_grad()
def coded(model: Tokenizer, split: Split, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (N, C, H, W) in [-1, 1] and their tokens (N, h, w), in order."""
    model.eval()
    for batch in ordered_batches(split, BATCH):
        image = 2 * move_batch(batch, device)["image"] - 1
        yield image, model.tokens(image)


def describe(
    model: Tokenizer, structure: Mapping[str, Any], config: VQGANLCConfig, data: Data | None, run: Run
) -> Metrics:
    """Return the use of the codebook in the last epoch and on the test images, the rate and the Frechet distance."""
    entries = len(model.codebook.table)
    values: dict[str, Metric] = {}
    for name in ("utilisation", "perplexity"):
        if (share := structure.get(f"train_{name}")) is not None:
            values[f"train_{name}"] = Metric(value=100.0 * share, unit="%", better="higher")
    if data is None or data.test is None or not len(data.test):
        return Metrics(values=values)
    usage, features = Usage(entries), _Features(config, run)
    first: list[Tensor] = []
    area = tokens = 1
    for image, codes in coded(model, data.test, run.device):
        usage.update(codes)
        again = model.images(codes)
        features.update(image, again)
        area, tokens = image.shape[-2] * image.shape[-1], codes[0].numel()
        first = first or [image, again]
    if usage.tokens < entries:
        run.warn(
            f"{PLUGIN}: the test images give {usage.tokens} tokens for {entries} entries, so test_utilisation cannot reach 100 %"
        )
    values |= {
        "test_utilisation": Metric(value=100.0 * usage.utilisation, unit="%", better="higher"),
        "test_perplexity": Metric(value=100.0 * usage.perplexity / entries, unit="%", better="higher"),
        "token_entropy": Metric(value=usage.entropy, unit="bits"),
        "bits_per_pixel": Metric(value=(entries - 1).bit_length() * tokens / area, unit="bits", better="lower"),
    }
    if (distance := features.distance()) is not None:
        values["feature_frechet"] = Metric(value=distance, better="lower")
    if run.keeps_files:
        with run.output("reconstructions.png", "png") as path:
            draw_samples(path, {"image": first[0], "again": first[1]}, 8)
    return Metrics(values=values)


class _Features:
    """Mean features of images and reconstructions, for their Frechet distance; none where the network cannot be opened."""

    def __init__(self, config: VQGANLCConfig, run: Run):
        self.found: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.network: FrozenFeatures | None = None
        try:
            self.network = FrozenFeatures(config.features, (config.feature_layer,), None).to(run.device)
        except RequestError as error:
            run.warn(f"{PLUGIN}: no feature_frechet: {error}")

    @torch.no_grad()
    def update(self, *images: Tensor) -> None:
        """Take in images and reconstructions, in [-1, 1]."""
        if self.network is not None:
            for found, image in zip(self.found, images, strict=True):
                found.append(self.network((image.clamp(-1, 1) + 1) / 2)[0].mean((2, 3)).cpu())

    def distance(self) -> float | None:
        """Return the Frechet distance; None without a network or with fewer than two images."""
        if not self.found[0] or sum(len(part) for part in self.found[0]) < 2:
            return None
        return frechet_distance(torch.cat(self.found[0]), torch.cat(self.found[1]))


def write_tokens(model: Tokenizer, path: Path, run: Run) -> dict[str, Any]:
    """Write one safetensors file: P(E) as `entries` (N, d), encoder, decoder and both 1x1 convolutions as in the state
    dict, and the tokens of every split of the data as `tokens.SPLIT` (images, h, w), int32, in the data's order, with
    `labels.SPLIT`. Returns details for the report.
    """
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    tensors = {key: value for key, value in state.items() if not key.startswith("codebook.")}
    tensors["entries"] = model.codebook.entries().detach().float().cpu().contiguous()
    details: dict[str, Any] = {"entries": len(tensors["entries"]), "normalised": model.codebook.normalised}
    for name in ("train", "test"):
        split = getattr(run.data, name, None)
        if split is None or not len(split):
            continue
        codes = torch.cat([found.cpu() for _, found in coded(model, split, run.device)])
        tensors[f"tokens.{name}"] = codes.to(torch.int32).contiguous()
        sample = split.batch([0])
        if "label" in sample:
            labels = [batch["label"] for batch in ordered_batches(split, BATCH)]
            tensors[f"labels.{name}"] = torch.cat(labels).to(torch.int32)
        details[f"{name}_images"] = len(codes)
    if run.data is None:
        run.warn(f"{PLUGIN}: no data, so the file holds no tokens; add --data")
    save_file(tensors, path, metadata={**header_metadata(make_header(run)), PLUGIN: json.dumps(details)})
    return details
