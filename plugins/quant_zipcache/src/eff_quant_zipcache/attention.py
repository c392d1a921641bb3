"""The attention function of models with a compressed cache, registered with transformers as "zipcache".

While there is nothing compressed (the prompt) it is PyTorch's fused attention on exact keys and values; later it reads the
packed codes. Salience needs the queries, which a cache does not see; so the function hands them on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eff.errors import UnsupportedModelError
from eff_quant_zipcache.cache import ZipLayer

NAME = "zipcache"
_NOT_SUPPORTED = ("softcap", "s_aux", "position_bias")


def zip_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend through the cache layer that `ZipLayer.update` noted on `key`; without one, as sdpa does."""
    layer: ZipLayer | None = getattr(key, "cache_layer", None)
    if layer is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    for name in _NOT_SUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"quant_zipcache: {type(module).__name__} uses attention with {name}, which a compressed cache does not"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    assert layer.keys is not None
    visible = visible_tokens(attention_mask, layer.keys.shape[2])
    if layer.segments:
        output = layer.attend(query, visible, scale).transpose(1, 2).contiguous()
    else:
        output, _ = sdpa_attention_forward(
            module, query, layer.keys, layer.values, attention_mask, dropout=dropout, scaling=scaling
        )
    layer.observe(query, visible, scale)
    return output, None


def visible_tokens(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Return which of the newest `tokens` each query sees, (batch, queries, tokens) bool; None: all before it and itself.

    Args:
        mask: (batch, 1, queries, length), bool or additive. transformers leaves it out where nothing is padding and there
            is one query, or as many as tokens.
        tokens: how many.
    """
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask >= 0
    return seen[:, 0, :, -tokens:]


AttentionInterface.register(NAME, zip_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
