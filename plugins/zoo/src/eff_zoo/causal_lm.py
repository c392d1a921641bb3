"""Small causal language models of Hugging Face transformers, untrained: Llama with grouped queries, and GPT-2.

Llama: Touvron et al., 2023, arXiv:2302.13971 (grouped queries: Ainslie et al., EMNLP 2023, arXiv:2305.13245). GPT-2:
Radford et al., 2019. They keep the libraries' parameter names, and `generate`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from eff.errors import MissingDependencyError


class GPT2TinyOptions(BaseModel):
    """Options of zoo:gpt2_tiny."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    vocabulary: int = Field(257, ge=3, description="Number of token ids; unset: the task's.")
    layers: int = Field(2, ge=1, description="Number of blocks.")
    dim: int = Field(64, ge=2, description="Width; a multiple of heads.")
    heads: int = Field(4, ge=1, description="Attention heads per block.")
    hidden: int = Field(128, ge=1, description="Hidden width of the MLP.")
    positions: int = Field(1024, ge=2, description="Longest text in tokens.")

    @model_validator(mode="after")
    def _heads_fit(self) -> GPT2TinyOptions:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}")
        return self


class LlamaTinyOptions(GPT2TinyOptions):
    """Options of zoo:llama_tiny."""

    kv_heads: int = Field(2, ge=1, description="Heads of keys and values; heads is a multiple of it.")

    @model_validator(mode="after")
    def _groups_fit(self) -> LlamaTinyOptions:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        return self


def llama_tiny(options: LlamaTinyOptions) -> nn.Module:
    """Return a `LlamaForCausalLM`; raises MissingDependencyError without transformers."""
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.dim, intermediate_size=options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.positions, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config)
    return made


def gpt2_tiny(options: GPT2TinyOptions) -> nn.Module:
    """Return a `GPT2LMHeadModel`; raises MissingDependencyError without transformers."""
    transformers = _transformers()
    config = transformers.GPT2Config(
        vocab_size=options.vocabulary, n_embd=options.dim, n_inner=options.hidden, n_layer=options.layers,
        n_head=options.heads, n_positions=options.positions, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made: nn.Module = transformers.GPT2LMHeadModel(config)
    return made


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "zoo: language models need transformers, which is not installed; pip install 'eff-zoo[text]'"
        ) from error
    return transformers
