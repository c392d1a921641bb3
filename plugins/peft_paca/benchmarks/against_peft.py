"""PaCA beside LoRA of the `peft` library: bytes kept for the backward pass and time of a training step.

    python plugins/peft_paca/benchmarks/against_peft.py [--model text|vit] [--samples 16] [--tokens 64] [--steps 50]

Both train the same model on the same batch in one process and take turns step by step. "in layers" counts what
the adapted layers themselves keep, "in all" every distinct byte the whole model keeps; parameters and buffers are
left out of both. Needs eff-peft-paca[claims].
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from eff.data import Batch
from eff_peft_paca.claims import text_setting, vit_setting
from eff_peft_paca.compare import Adapted, Setting, kept, step_times, with_full, with_lora, with_paca


class Long:
    """A split whose texts are filled to one length, so that the cost of a step does not hang on the sentences."""

    def __init__(self, split, tokens: int):
        self._split, self._tokens = split, tokens

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices, generator=None) -> Batch:
        """Return sentences repeated to the length."""
        batch = self._split.batch(indices, generator)
        times = -(-self._tokens // batch["input_ids"].shape[1])
        ids = batch["input_ids"].repeat(1, times)[:, : self._tokens]
        return {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fingerprint(self) -> str:
        """Return the split's."""
        return self._split.fingerprint()


def measure(model: torch.nn.Module, setting: Setting, samples: int, steps: int) -> None:
    """Print one row per way of training."""
    settings = {
        "full tuning": with_full(model, setting),
        "LoRA (peft)": with_lora(model, setting),
        "PaCA": with_paca(model, setting),
        "PaCA, int8 base": with_paca(model, setting, quantize_base="int8"),
        "PaCA, nf4 base": with_paca(model, setting, quantize_base="nf4"),
    }
    found = {name: kept(adapted, samples) for name, adapted in settings.items()}
    times = step_times(settings, samples, steps)
    print(
        f"{'':16} {'trained':>10} {'in layers':>11} {'in all':>11} {'base weights':>13} {'step':>9} {'over LoRA':>10}"
    )
    for name, adapted in settings.items():
        layers, total = found[name]
        print(
            f"{name:16} {adapted.trained:>10,} {layers / 1e6:>8.2f} MB {total / 1e6:>8.2f} MB "
            f"{base_bytes(adapted) / 1e6:>10.2f} MB {times[name]:>6.1f} ms {times[name] / times['LoRA (peft)']:>10.2f}"
        )


def base_bytes(adapted: Adapted) -> int:
    """Return the bytes of the adapted layers' weights and buffers, without what is trained beside them."""
    own = [
        (name, value)
        for layer in adapted.layers.values()
        for name, value in (*layer.named_parameters(), *layer.named_buffers())
    ]
    return sum(
        value.numel() * value.element_size()
        for name, value in own
        if "lora_" not in name and name not in ("p", "index")
    )


def main() -> None:
    """Measure on MiniLM and on a small ViT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("text", "vit"), help="unset: both")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {options.steps} steps")
    if options.model in (None, "text"):
        model, setting = text_setting(0)
        data = replace(setting.data, train=Long(setting.data.train, options.tokens))
        print(f"\nMiniLM-L6, {options.samples} texts of {options.tokens} tokens")
        measure(model, replace(setting, data=data, device=device), options.samples, options.steps)
    if options.model in (None, "vit"):
        model, setting = vit_setting(0)
        print(f"\nzoo:vit_micro, {2 * options.samples} images of 8 x 8")
        measure(model, replace(setting, device=device), 2 * options.samples, options.steps)


if __name__ == "__main__":
    main()
