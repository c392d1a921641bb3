"""A `transformers` cache whose tokens are stored in few bits, the salient ones in more.

The prompt is compressed when it has been read. New tokens stay in float until there are `streaming_gap` of them; then
they become a segment of their own, with its own c and key ranges (`requantize_old`: the whole cache is quantized anew, as
in the released code). Attention reads the codes: see `attention.py`, which a model must be set to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from eff_kernels.kv_quant import QuantizedKV, kv_attention, kv_dequantize, kv_quantize_parts
from eff_quant_zipcache.config import ZipCacheConfig
from eff_quant_zipcache.importance import Mask, Probes, all_rows, choose_probes, importance, least


class ZipLayer(CacheLayerMixin):
    """The cache of one attention layer.

    Args:
        config: options.
        index: of the layer; its probes are drawn by seed and index.
    """

    is_sliding = False

    def __init__(self, config: ZipCacheConfig, index: int = 0):
        super().__init__()
        self.config, self.index = config, index
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        self.segments: list[QuantizedKV] = []
        self.queries: Tensor | None = None
        """Of the tokens in float, (batch, query heads, tokens, dim)."""
        self.present: Tensor | None = None
        """Which of the tokens in float are no padding, (batch, tokens) bool."""
        self.visible: Tensor | None = None
        """Which of the tokens in float they see, (batch, tokens, tokens) bool; None: the earlier ones, and none is padding."""
        self.length = 0
        self.agreement: list[float] | None = None
        """Where it is a list, each compression adds the share of tokens that are salient by the full attention matrix too."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens, (batch, heads, tokens, dim); return them with a note of this layer for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.length += key_states.shape[2]
        noted = key_states.view_as(key_states)
        noted.cache_layer = self  # type: ignore[attr-defined]
        return noted, value_states

    def attend(self, query: Tensor, visible: Tensor | None, scale: float) -> Tensor:
        """Return attention of the newest queries over what is compressed and what is not, like `query`.

        Args:
            query: (batch, query heads, queries, dim).
            visible: which tokens in float they see, (batch, queries, tokens) bool; they see all compressed ones. None: all.
            scale: of the scores.
        """
        assert self.keys is not None and self.values is not None
        return kv_attention(query, self.segments, (self.keys, self.values), scale, visible)

    def observe(self, query: Tensor, visible: Tensor | None, scale: float) -> None:
        """Note the queries of the newest tokens, and compress when it is time.

        Args:
            query, scale: as in `attend`.
            visible: as in `attend`; None: each sees itself and what is before it.
        """
        batch, _, new, _ = query.shape
        if visible is None:
            present = torch.ones(batch, new, dtype=torch.bool, device=query.device)
        else:  # a token that does not see itself is padding
            present = visible[:, :, -new:].diagonal(dim1=1, dim2=2)
        if self.queries is None or self.present is None:
            self.queries, self.present, self.visible = query, present, visible
        else:
            if visible is not None or self.visible is not None:
                known = self.present.shape[1]
                causal = torch.ones(known + new, known + new, dtype=torch.bool, device=query.device).tril()
                earlier = causal[:known, :known].expand(batch, -1, -1) if self.visible is None else self.visible
                newest = causal[known:].expand(batch, -1, -1) if visible is None else visible
                self.visible = torch.cat([F.pad(earlier, (0, new)), newest], 1)
            self.queries = torch.cat([self.queries, query], 2)
            self.present = torch.cat([self.present, present], 1)
        is_due = not self.segments or self.present.shape[1] >= self.config.streaming_gap
        if is_due and bool(self.present.any()):
            self._compress(scale)

    def _compress(self, scale: float) -> None:
        config, present = self.config, self.present
        assert self.keys is not None and self.values is not None and present is not None
        old_keys, old_values = self.dequantized()
        probes = choose_probes(present, config.probe_recent, config.probe_random, self.generator)
        score = self._scores(old_keys, probes, scale)
        other_k, other_v = (
            least(score, present, ratio, config.split_per_head)
            for ratio in (config.unsalient_ratio_k, config.unsalient_ratio_v)
        )
        if self.agreement is not None:
            exact = least(
                self._scores(old_keys, all_rows(present), scale),
                present,
                config.unsalient_ratio_k,
                config.split_per_head,
            )
            salient = ~exact & present[:, None]
            self.agreement.append(float((salient & ~other_k).sum() / salient.sum().clamp(min=1)))
        kept = present[:, None].expand_as(other_k)
        keys, values = self.keys, self.values
        if config.requantize_old and self.segments:
            old_kept, old_k, old_v = self._classes()
            kept, other_k, other_v = (
                torch.cat(pair, 2) for pair in ((old_kept, kept), (old_k, other_k), (old_v, other_v))
            )
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            self.segments = []
        high, low = config.bits_salient, config.bits_other
        parts = [
            (kept & (other_k if k == low else ~other_k) & (other_v if v == low else ~other_v), k, v)
            for k in dict.fromkeys((high, low))
            for v in dict.fromkeys((high, low))
        ]
        if high == low:
            parts = [(kept, high, high)]
        self.segments.append(kv_quantize_parts(keys, values, parts, config.key_scheme, config.value_scheme))
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        self.queries = self.present = self.visible = None

    def _scores(self, old_keys: Tensor, probes: Probes, scale: float) -> Tensor:
        """Return the importance of the tokens in float; attention runs over the compressed ones too."""
        assert self.keys is not None and self.queries is not None and self.present is not None
        stored = self._classes()[0][:, 0] if self.segments else self.present[:, :0]
        mask = Mask(stored, self.present, self.visible)
        keys = torch.cat([old_keys, self.keys], 2)
        return importance(self.queries, keys, mask, probes, scale, self.config)[..., stored.shape[1] :]

    def _classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return which compressed tokens exist, and whose keys and values have few bits; (batch, heads, length) bool."""
        found: tuple[list[Tensor], ...] = ([], [], [])
        for segment in self.segments:
            masks = [part.mask(segment.length) for part in segment.parts]
            none = torch.zeros_like(masks[0])
            few = self.config.bits_other
            for row, chosen in zip(
                found,
                (
                    masks,
                    [mask for mask, part in zip(masks, segment.parts, strict=True) if part.keys.bits == few],
                    [mask for mask, part in zip(masks, segment.parts, strict=True) if part.values.bits == few],
                ),
                strict=True,
            ):
                row.append(torch.stack([none, *chosen]).any(0))
        kept, keys, values = (torch.cat(row, 2) for row in found)
        return kept, keys, values

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the compressed tokens, (batch, heads, length, dim), 0 for padding."""
        assert self.keys is not None and self.values is not None
        if not self.segments:
            return self.keys[:, :, :0], self.values[:, :, :0]
        pairs = [kv_dequantize(segment) for segment in self.segments]
        return torch.cat([keys for keys, _ in pairs], 2), torch.cat([values for _, values in pairs], 2)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, parameters, positions and of the tokens in float with their queries."""
        held = [x for x in (self.keys, self.values, self.queries, self.present, self.visible) if x is not None]
        return sum(x.numel() * x.element_size() for x in held) + sum(segment.nbytes for segment in self.segments)

    def float_bytes(self, width: int = 2) -> int:
        """Bytes of the same tokens in floats of `width` bytes, without padding."""
        if not self.is_initialized:
            return 0
        assert self.keys is not None
        batch, heads, _, dim = self.keys.shape
        tokens = 0 if self.present is None else int(self.present.sum())
        for segment in self.segments:
            for part in segment.parts:
                tokens += batch * part.tokens if part.counts is None else int(part.counts.sum())
        return 2 * heads * dim * tokens * width

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no largest length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask for the next `query_length` tokens."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self.__init__(self.config, self.index)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with these sequences of the batch, for beam search."""
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        index = beam_idx.to(self.device)
        self.segments = [segment.select(index) for segment in self.segments]
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        if self.queries is not None and self.present is not None:
            self.queries, self.present = self.queries.index_select(0, index), self.present.index_select(0, index)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        if self.is_initialized:
            assert self.keys is not None
            self.reorder_cache(torch.arange(len(self.keys), device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self.reorder_cache(torch.as_tensor(indices))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was compressed together cannot be cut."""
        raise NotImplementedError(
            "a compressed cache cannot be cut; decode without assistants, or with use_cache=False"
        )


class ZipCache(Cache):
    """The cache of a model, for `past_key_values`.

    Args:
        config: options.
        layers: how many the model has.
    """

    def __init__(self, config: ZipCacheConfig, layers: int):
        super().__init__(layers=[ZipLayer(config, index) for index in range(layers)])
        self.config = config

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def compression_ratio(self) -> float:
        """Return how many times more a cache of 16-bit floats takes."""
        return sum(layer.float_bytes() for layer in self.layers) / self.nbytes
