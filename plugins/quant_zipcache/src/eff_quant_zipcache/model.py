"""Giving a language model of Hugging Face transformers a compressed cache."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff_quant_zipcache.cache import ZipCache
from eff_quant_zipcache.config import ZipCacheConfig


class Compressed:
    """What is put before the class of a model: its caches are `ZipCache`s.

    `generate` makes one. A plain call in evaluation mode reads the text as generation would: the first `prefill` share at
    once, the rest in steps of `streaming_gap` tokens, each of which sees the earlier ones through the compressed cache and
    its own step's in float, as in decoding one by one. With `use_cache=False`, in training mode and where gradients are
    recorded (codes have none), nothing is compressed.
    """

    zip_config: ZipCacheConfig
    config: Any
    training: bool

    def make_cache(self) -> ZipCache:
        """Return an empty cache for this model."""
        return ZipCache(self.zip_config, self.config.get_text_config(decoder=True).num_hidden_layers)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate through a compressed cache, unless another is given."""
        if kwargs.get("use_cache", True) and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self.make_cache()
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the model returns; without a cache, that of a text read through one."""
        is_exact = self.training or torch.is_grad_enabled() or use_cache is False
        if is_exact or input_ids is None or past_key_values is not None:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
        labels, positions = kwargs.pop("labels", None), kwargs.pop("position_ids", None)
        cache = self.make_cache()
        logits = []
        for start, end in self.steps(input_ids.shape[1]):
            here = {} if positions is None else {"position_ids": positions[..., start:end]}
            mask = None if attention_mask is None else attention_mask[:, :end]
            output = super().forward(  # type: ignore[misc]
                input_ids=input_ids[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True,
                **here, **kwargs,
            )  # fmt: skip
            logits.append(output.logits)
        output.logits = torch.cat(logits, 1)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, vocab_size=output.logits.shape[-1])  # type: ignore[attr-defined]
        return output

    def steps(self, length: int) -> list[tuple[int, int]]:
        """Return where each step of reading a text of `length` tokens starts and ends."""
        first = min(length, max(1, int(self.zip_config.prefill * length)))
        gap = self.zip_config.streaming_gap
        return [(0, first), *((start, min(start + gap, length)) for start in range(first, length, gap))]


def compress(model: nn.Module, config: ZipCacheConfig) -> nn.Module:
    """Return the model with a compressed cache; its weights stay as they are.

    Raises:
        UnsupportedModelError: no causal language model of transformers, or one whose attention a cache by tokens does not fit.
    """
    check_supported(model, config)
    from eff_quant_zipcache.attention import NAME

    model.set_attn_implementation(NAME)  # type: ignore[operator]
    base = type(model)
    names = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)  # `generate` asks the signature what a model takes
    def forward(self: Compressed, *args: Any, **kwargs: Any) -> Any:
        return Compressed.forward(self, **dict(zip(names, args, strict=False)), **kwargs)

    # A class of its own rather than a changed `forward`: copies and other methods keep working on the model.
    model.__class__ = type(f"ZipCache{base.__name__}", (Compressed, base), {"forward": forward})
    model.zip_config = config  # type: ignore[assignment]
    return model


def check_supported(model: nn.Module, config: ZipCacheConfig) -> None:
    """Raise an UnsupportedModelError where the cache of `model` cannot be compressed."""
    from transformers import GenerationMixin, PreTrainedModel

    name = type(model).__name__
    if isinstance(model, Compressed):
        raise UnsupportedModelError(f"quant_zipcache: {name} has a compressed cache already; apply it once")
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise UnsupportedModelError(
            f"quant_zipcache: {name} is no language model of transformers, so it has no key/value cache; "
            "use e.g. hf:NAME or zoo:llama_tiny"
        )
    inner = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"quant_zipcache: the attention of {name} cannot be replaced through transformers' attention interface; "
            "use a decoder such as Llama, Qwen2, Mistral or GPT-2"
        )
    kinds = set(getattr(inner, "layer_types", None) or ["full_attention"])
    window = getattr(inner, "sliding_window", None) if getattr(inner, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window is not None:
        found = ", ".join(sorted(kinds - {"full_attention"})) or f"a sliding window of {window} tokens"
        raise UnsupportedModelError(
            f"quant_zipcache: {name} has {found}; tokens that leave a cache again cannot be stored together, "
            "use a model with full attention in all layers"
        )
    if getattr(inner, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(
            f"quant_zipcache: {name} caps its attention scores, which a compressed cache does not"
        )
    dim = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
    fits = max(8 // min(config.bits_other, config.bits_salient), 4)
    if dim % fits:
        raise UnsupportedModelError(
            f"quant_zipcache: the heads of {name} have {dim} channels, codes of {config.bits_other} bits fill whole bytes "
            f"for multiples of {fits}; use a model with another head size"
        )
