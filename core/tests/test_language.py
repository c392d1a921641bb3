"""Language modelling: the corpus, byte tokens, the task, training, prediction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eff.data import load_data
from eff.errors import DataError, Problems, UnsupportedModelError
from eff.language import LanguageModeling, LanguageModelingOptions
from eff.runner import apply
from eff.schemas import Recipe, TaskSpec, TrainOptions
from eff.tokenizing import load_tokenizer
from eff.use import UseRequest, evaluate, predict


class Bigram(nn.Module):
    """A table of the next token's logits."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def bigram(vocabulary: int = 257) -> nn.Module:
    return Bigram(vocabulary)


def flat(vocabulary: int = 257) -> nn.Module:
    return nn.Flatten()


@pytest.fixture
def source(monkeypatch):
    """This module under a name that a model source can have."""
    import sys

    monkeypatch.setitem(sys.modules, "bigram_models", sys.modules[__name__])
    return "bigram_models:bigram"


def test_bytes_come_back_as_the_text():
    tokenizer = load_tokenizer("bytes")
    [ids] = tokenizer.encode(["Grüße"], 100)
    assert ids[:2] == [ord("G"), ord("r")] and len(ids) == 7 and max(ids) < tokenizer.pad < tokenizer.size
    assert tokenizer.decode([*ids, tokenizer.pad]) == "Grüße"
    with pytest.raises(DataError, match="is a hash, its ids cannot be turned into text"):
        load_tokenizer("words:64").decode([3])


def test_the_corpus_needs_no_file_and_its_test_windows_follow_the_training_text():
    data = load_data("corpus?length=64")
    assert data.task == TaskSpec(name="language_modeling", options={"tokenizer": "bytes", "length": 64})
    assert len(data.train) > 8 * len(data.test) > 1000
    batch = data.test.batch([0, 1])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 64)
    assert load_data("corpus?length=64&test=5&train=0").train is None
    assert (
        load_data("corpus?length=64&test=5").fingerprint() != load_data("corpus?length=64&test=5&seed=1").fingerprint()
    )


def test_a_file_is_cut_into_windows_in_its_order(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10, encoding="utf-8")
    data = load_data(f"corpus:{tmp_path / 'a.txt'}?length=20")
    assert (len(data.train), len(data.test)) == (4, 1)
    assert bytes(data.train.batch([1])["input_ids"][0].tolist()) == b"01234567890123456789"


@pytest.mark.parametrize(
    ("text", "query", "message"),
    [
        (b"too short", "", "9 tokens are less than two windows of 256; use a longer text or"),
        (b"   ", "", "is empty; a text needs at least one word"),
        (b"\xff\xfe", "", "is not UTF-8 text"),
        (b"word " * 200, "?length=10&train=200", "train=200 asks for more than the 90 train windows"),
        (b"word " * 200, "?length=10&train=0&test=0", "train=0 and test=0 leave nothing"),
        (b"word " * 200, "?length=1", "length must be a whole number of tokens, 2 to"),
        (b"word " * 200, "?lenght=10", "option 'lenght' is unknown; did you mean 'length'"),
        (None, "", "there is no file or folder"),
    ],
)
def test_a_corpus_that_cannot_be_used_says_why(text, query, message, tmp_path):
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises((DataError, Problems), match=message):
        load_data(f"corpus:{tmp_path / 'a.txt'}{query}")


def test_the_model_keeps_its_tokenizer_and_its_length():
    task = TaskSpec(name="language_modeling", options={"tokenizer": "words:99", "length": 32})
    assert load_data("corpus?train=2&test=2", task).task == task
    with pytest.raises(DataError, match="the model reads words:99, the data say bytes; leave"):
        load_data("corpus?tokenizer=bytes", task)
    with pytest.raises(DataError, match="is running text; the model's task is classification"):
        load_data("corpus", TaskSpec(name="classification"))


def test_loss_and_perplexity_are_those_worked_by_hand():
    """Two tokens are predicted with probabilities 1/2 and 1/4; what is padding does not count."""
    task = LanguageModeling(LanguageModelingOptions(length=4))
    logits = torch.full((1, 4, 257), -torch.inf)
    logits[0, 0, :2] = 0.0
    logits[0, 1, :4] = 0.0
    logits[0, 2:] = 0.0
    batch = {"input_ids": torch.tensor([[7, 0, 3, 256]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    meter = task.meter()
    meter.update(logits, batch)
    values = meter.compute().values
    assert values["cross_entropy"].value == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert values["perplexity"].value == pytest.approx(math.sqrt(8))
    assert values["accuracy"].value == pytest.approx(50.0)
    assert float(task.loss(logits, batch)) == pytest.approx((math.log(2) + math.log(4)) / 2)
    with pytest.raises(DataError, match="no tokens to measure on"):
        task.meter().compute()


def test_a_language_model_is_trained_evaluated_and_continues_a_text(source, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 200, encoding="utf-8")
    data = f"corpus:{tmp_path / 'a.txt'}?length=32"
    recipe = Recipe(
        model=source, data=data, train=TrainOptions(epochs=15, batch_size=16, optimizer="adam", lr=1.0), device="cpu"
    )
    report = apply(recipe, tmp_path / "run")
    assert report.after.metrics.values["perplexity"].value < 1.5
    (tmp_path / "prompt.txt").write_text("xyz abc", encoding="utf-8")
    request = UseRequest(str(tmp_path / "run"), device="cpu")
    [said] = predict(request, [tmp_path / "prompt.txt"], tmp_path / "said.txt")
    assert said.rows[0]["continuation"] == "defghabcdefghabc" == (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert evaluate(request).metrics.values["accuracy"].value == pytest.approx(100.0)


def test_what_is_no_language_model_is_refused(source, tmp_path):
    recipe = Recipe(model="bigram_models:flat", data="corpus?train=4&test=4", device="cpu")
    with pytest.raises(UnsupportedModelError, match="Flatten does not take input_ids and .* it is no language model"):
        apply(recipe, tmp_path / "run")
