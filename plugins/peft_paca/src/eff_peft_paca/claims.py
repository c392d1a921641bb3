"""The paper's claim at desk scale, on a text encoder and on a ViT, against LoRA of the `peft` library.

Text: MiniLM-L6 with mean pooling and a new head learns six kinds of generated sentences (`sentences`). LoRA of
rank 8 and PaCA of rank 16 train exactly as many numbers. Images: a small ViT is trained on the digits 0 to 4 and
then learns 5 to 9; its layers are not square, so PaCA's rank is chosen by layer, never with more numbers than
LoRA's of rank 4. All train by AdamW with a cosine schedule; adapters have scale 1 and no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Batch, Data, Split, load_data
from eff.models import ModelRequest, build_model, make_task, open_model, parse_source
from eff.run import Run
from eff.schemas import CORE_TRAINING, TaskSpec, TrainOptions
from eff.seeding import seed_everything
from eff.session import Plugins
from eff.training import Training
from eff_peft_paca.compare import Setting, compare
from eff_peft_paca.config import PaCAConfig

ENCODER = "zoo:minilm_classifier"
VIT = "zoo:vit_micro"
LR = {"adapters": 1e-3, "full": 1e-4, "probe": 1e-2}
VIT_LR = {"adapters": 1e-3, "full": 1e-3, "probe": 1e-2}
# Numbers per layer at most LoRA's of rank 4: 4 (in + out) / out columns.
VIT_RANKS = {"qkv": 5, "proj": 8, "fc1": 5, "fc2": 20}


def text_setting(seed: int) -> tuple[nn.Module, Setting]:
    """Return the encoder and what is compared on it."""
    plugins = Plugins()
    request = ModelRequest(ENCODER, data=f"eff_peft_paca.sentences:sentences?seed={seed}", seed=seed)
    opened = open_model(request, plugins)
    assert opened.data is not None
    return opened.model, Setting(
        opened.data, lora_rank=8, paca=PaCAConfig(r=16, alpha=16, seed=seed), epochs=2, lr=LR, seed=seed
    )


class Digits:
    """The samples of a split whose label lies in a range, counted from 0."""

    def __init__(self, split: Split, first: int, last: int):
        labels = split.batch(range(len(split)))["label"]
        self._split = split
        self._first = first
        self._chosen = ((labels >= first) & (labels <= last)).nonzero().flatten().tolist()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._chosen)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples with labels from 0."""
        batch = self._split.batch([self._chosen[index] for index in indices], generator)
        return {**batch, "label": batch["label"] - self._first}

    def fingerprint(self) -> str:
        """Return the whole split's hash with the range."""
        return f"{self._split.fingerprint()}/{self._first}"


def digits(seed: int, first: int, last: int) -> Data:
    """Return the digits of a range as data with as many classes."""
    data = load_data(f"digits?seed={seed}")
    names = [str(digit) for digit in range(first, last + 1)]
    task = TaskSpec(name=data.task.name, options={**data.task.options, "classes": names})
    return Data(data.spec, task, Digits(data.split("train"), first, last), Digits(data.split("test"), first, last))


def vit_setting(seed: int) -> tuple[nn.Module, Setting]:
    """Return a ViT that knows 0 to 4, with a new head, and what is compared on 5 to 9."""
    plugins = Plugins()
    before, after = digits(seed, 0, 4), digits(seed, 5, 9)
    recipe = TrainOptions(epochs=30, batch_size=32, lr=1e-3, optimizer="adamw", augment=False).over(CORE_TRAINING)
    run = Run(make_task(before.task, plugins), torch.device("cpu"), seed, before, train=recipe, training=True)
    model = build_model(parse_source(VIT), run, plugins)
    Training(model, run, plugins).run_all()
    seed_everything(seed, "head")
    model.head.reset_parameters()  # type: ignore[union-attr,operator]
    ranks = {name: float(rank) for name, rank in VIT_RANKS.items()}
    paca = PaCAConfig(rank_pattern=VIT_RANKS, alpha_pattern=ranks, seed=seed)
    return model, Setting(after, lora_rank=4, paca=paca, epochs=20, lr=VIT_LR, batch_size=32, seed=seed)


def minilm_sentences(run: ClaimRun) -> dict[str, list[float]]:
    """Return what is measured on the text encoder for each seed."""
    return _collect([compare(*text_setting(seed)) for seed in run.log.track(run.seeds, "minilm_sentences")])


def vit_digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return what is measured on the ViT for each seed."""
    return _collect([compare(*vit_setting(seed)) for seed in run.log.track(run.seeds, "vit_digits")])


def _collect(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
