"""Putting the codebook into an autoencoder, and rebuilding what a checkpoint remembers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff.distributed import processes
from eff.errors import RequestError, UnsupportedModelError
from eff.run import Run
from eff.seeding import derive_seed
from eff_quant_vqgan_lc.codebook import TINY, Codebook, make_codebook
from eff_quant_vqgan_lc.config import VQGANLCConfig
from eff_quant_vqgan_lc.features import FrozenFeatures
from eff_quant_vqgan_lc.model import PLUGIN, Tokenizer, latent_channels
from eff_quant_vqgan_lc.table import MADE, make_table
from eff_quant_vqgan_lc.task import Tokenization

SAMPLES = 64
"""Images whose latents the entries are matched to."""
FAR = 10.0
"""Ratio of spreads of entries and latents from which a warning is due."""


def insert(
    model: nn.Module, config: VQGANLCConfig, structure: dict[str, Any], run: Run, table: Tensor | None = None
) -> Tokenizer:
    """Return the tokenizer made of an autoencoder; notes in `structure` what a rebuild needs.

    Args:
        table: E (n_codes, width), where it is there already; else made or read as `config` says.

    Raises:
        RequestError: wrong task. ConfigError: table or features do not fit. UnsupportedModelError: no autoencoder.
    """
    if not isinstance(run.task, Tokenization):
        raise RequestError(f"{PLUGIN}: needs an autoencoder of images; this model's task is {run.task.name}")
    if isinstance(model, Tokenizer):
        raise UnsupportedModelError(f"{PLUGIN}: the model is a tokenizer already")
    if processes() > 1 and (config.codebook == "ema" or config.rate_d > 0):
        raise RequestError(
            f"{PLUGIN}: moving averages and the discriminator live in one process; leave out --devices, or use rate_d=0"
        )
    sample = torch.zeros(1, *run.task.options.input_shape, device=run.device)
    channels = latent_channels(model, sample)
    if config.from_features and table is None:
        network = None
        if config.table in MADE:
            network = FrozenFeatures(config.features, (config.feature_layer,), config.feature_size).to(run.device)
        table = make_table(config, run, network)
    if config.from_features and table is not None and config.code_dim > table.shape[1]:
        _check_width(config, table.shape[1], run)
    if config.codebook == "ema" and run.train.batch_size == 1:
        run.warn(f"{PLUGIN}: batches of one image make moving averages follow that image; use a larger --batch-size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"{PLUGIN}/codebook"))
        tokenizer = Tokenizer(model, channels, config.code_dim, make_codebook(config, table, config.n_codes))
    width = tokenizer.codebook.table.shape[1]
    structure |= {"channels": channels, "entries": config.n_codes, "width": width, "finished": False}
    tokenizer.to(run.device)
    structure["start"] = _start(tokenizer, config.start, run)
    return tokenizer


def _check_width(config: VQGANLCConfig, width: int, run: Run) -> None:
    if config.projector == "none":
        raise RequestError(
            f"{PLUGIN}: code_dim is {config.code_dim}, the table {width} wide and has no more principal components; lower "
            "code_dim or use projector=linear"
        )
    run.warn(
        f"{PLUGIN}: code_dim {config.code_dim} is more than the table's width {width}; entries fill {width} dimensions at most"
    )


@torch.no_grad()
def _start(model: Tokenizer, start: str, run: Run) -> dict[str, float]:
    """Match the entries to latents where that is asked for; return how they lie: what begins far away dies at once."""
    if model.codebook.normalised or run.data is None or run.data.train is None:
        return {}
    batch = next(run.batches("train", samples=SAMPLES, batch_size=SAMPLES))
    z = model.quant_conv(model.encoder(2 * batch["image"] - 1)).permute(0, 2, 3, 1)
    z = z.reshape(-1, z.shape[-1])
    if start == "matched":
        model.codebook.match(z)
    entries = model.codebook.entries()
    found = {
        "entries_std": float(entries.std(0).mean()),
        "latents_std": float(z.std(0).mean()),
        "distance_of_means": float((entries.mean(0) - z.mean(0)).norm()),
    }
    ratio = found["entries_std"] / max(found["latents_std"], TINY)
    if not 1 / FAR <= ratio <= FAR:
        run.warn(
            f"{PLUGIN}: at the start the entries spread {ratio:.3g} times as far as the latents, so few will be used; "
            "start=matched changes that"
        )
    return found


def rebuild(model: nn.Module, config: VQGANLCConfig, structure: Mapping[str, Any]) -> Tokenizer:
    """Return the structure with zeros as entries, to load a state into."""
    entries, width = structure["entries"], structure["width"]
    device = next(model.parameters()).device
    if structure["finished"]:
        codebook = Codebook(torch.zeros(entries, width), False, None, config.codebook == "factorized", config.chunk)
    else:
        codebook = make_codebook(config, torch.zeros(entries, width), entries)
    return Tokenizer(model, structure["channels"], config.code_dim, codebook).to(device)
