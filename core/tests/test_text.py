"""Text classification: tokenizers, the CSV source, the task, and models from transformers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from eff.data import load_data, ordered_batches
from eff.errors import DataError, MissingDependencyError, Problems, UnsupportedModelError
from eff.models import ModelRequest, file_of, open_model
from eff.runner import apply
from eff.schemas import DataSpec, Recipe, TaskSpec, TrainOptions
from eff.session import Plugins
from eff.text import TextClassification, TextClassificationOptions
from eff.tokenizing import load_tokenizer, pinned
from eff.use import UseRequest, export_model, predict

ROWS = [
    (f"{word} number {index}", "fruit" if word in ("apple", "pear") else "tool")
    for index in range(20)
    for word in ("apple", "pear", "hammer", "saw")
]


class Bag(nn.Module):
    """Mean of word vectors, then a linear layer."""

    def __init__(self, num_classes: int = 2, words: int = 4096):
        super().__init__()
        self.vectors = nn.Embedding(words, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, input_ids, attention_mask):
        weight = attention_mask.unsqueeze(-1).float()
        return self.head((self.vectors(input_ids) * weight).sum(1) / weight.sum(1))


def bag(num_classes: int = 2) -> nn.Module:
    return Bag(num_classes)


@pytest.fixture
def texts(tmp_path) -> Path:
    return write(tmp_path / "texts.csv", ROWS)


def write(path: Path, rows, header=("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def tokenizer_file(path: Path, words=("apple", "pear", "hammer", "saw", "number")) -> Path:
    """Write a word-level tokenizer.json as Hugging Face models have it."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers (eff-core[text])")
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *words))}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    made.save(str(path))
    return path


# --- tokenizers


def test_hashed_words_start_with_the_start_id_and_stay_below_their_size():
    [ids] = load_tokenizer("words:64").encode(["A cat, a CAT!"], 16)
    assert ids[0] == 1 and ids[1] == ids[4] and ids[2] == ids[5]
    assert all(2 <= index < 64 for index in ids[1:])


def test_texts_are_cut_at_the_longest_length():
    assert len(load_tokenizer("words:64").encode(["one two three four"], 3)[0]) == 3


def test_a_tokenizer_file_gives_its_ids_with_special_tokens(tmp_path):
    path = tokenizer_file(tmp_path / "tokenizer.json")
    assert load_tokenizer(f"file:{path}").encode(["apple saw pizza"], 16) == [[2, 4, 7, 1, 3]]
    assert load_tokenizer(f"file:{path}").encode(["apple saw pizza"], 3) == [[2, 4, 3]]


def test_a_pinned_tokenizer_that_changed_is_refused(tmp_path):
    name = pinned(f"file:{tokenizer_file(tmp_path / 'tokenizer.json')}")
    assert name[-17] == "@" and pinned(name) == name
    load_tokenizer.cache_clear()
    tokenizer_file(tmp_path / "tokenizer.json", ("other", "words"))
    with pytest.raises(DataError, match=r"is not the one the model was made with \(@[0-9a-f]{16}, not @"):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("letters", DataError, "tokenizer 'letters': write bytes, words:SIZE, file:PATH"),
        ("words:2", DataError, "the size must be a whole number from 3"),
        ("file:nowhere.json", DataError, "tokenizer 'file:nowhere.json': there is no file nowhere.json"),
        ("package:no_such_thing/x.json", MissingDependencyError, "pip install no-such-thing"),
    ],
)
def test_a_wrong_tokenizer_name_says_what_is_right(name, error, message):
    pytest.importorskip("tokenizers", reason="needs tokenizers (eff-core[text])")
    with pytest.raises(error, match=message):
        load_tokenizer(name)


# --- csv


def test_a_csv_file_is_split_by_seed_and_records_its_tokenisation(texts):
    data = load_data(f"csv:{texts}")
    assert (len(data.train), len(data.test)) == (64, 16)
    assert data.task.name == "text_classification"
    assert data.task.options == {"classes": ["fruit", "tool"], "tokenizer": "words:4096", "max_length": 128}
    assert load_data(str(texts)).fingerprint() == data.fingerprint()
    assert load_data(f"csv:{texts}?seed=1").fingerprint() != data.fingerprint()
    assert load_data(f"csv:{texts}?tokenizer=words:64").fingerprint() != data.fingerprint()


def test_a_batch_is_filled_up_to_its_longest_text(tmp_path):
    write(tmp_path / "train.csv", [("one two three", "a"), ("one", "b")])
    data = load_data(f"csv:{tmp_path}")
    batch = data.train.batch([0, 1])
    assert data.test is None
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"][1, 2:].tolist() == [0, 0]
    assert batch["label"].tolist() == [0, 1]


def test_other_columns_and_numeric_labels_are_read(tmp_path):
    path = write(tmp_path / "a.csv", [("x", "10", "note"), ("y", "9", "note")] * 5, ("review", "stars", "more"))
    assert load_data(f"csv:{path}?text=review&label=stars").task.options["classes"] == ["9", "10"]


def test_labels_get_the_indices_of_the_models_classes(texts):
    task = TaskSpec(name="text_classification", options={"classes": ["animal", "tool", "fruit"]})
    data = load_data(f"csv:{texts}", task)
    assert {int(label) for batch in ordered_batches(data.test, 64) for label in batch["label"]} == {1, 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"has no column 'text'; columns are none"),
        (b"txt,label\na,b\n", r"has no column 'text'; did you mean 'txt'\?; columns are txt, label"),
        (b"text,label\n", "has no rows below its header"),
        (b"text,label\nhello,\n", "line 2: column 'label' is empty"),
        (b"text,label\n  ,a\n", "line 2: column 'text' is empty"),
        (b"text,label\n\xff\xfe,a\n", "is not UTF-8 text"),
        (b'text,label\n"open,a\n', "is no CSV file that can be read"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(f"csv:{path}")


def test_a_folder_without_csv_files_and_wrong_options_are_refused(tmp_path, texts):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has neither train\.csv nor test\.csv"):
        load_data(f"csv:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match=r"max_length must be a whole number of tokens, .* got '0'"):
        load_data(f"csv:{texts}?max_length=0")
    with pytest.raises(DataError, match="there are 80 texts in all"):
        load_data(f"csv:{texts}?train=80&test=1")
    with pytest.raises((DataError, Problems), match="option 'size' is unknown; csv knows train, test, seed"):
        load_data(f"csv:{texts}?size=8")


def test_images_and_texts_are_not_mixed_up(texts):
    images = {"input_shape": [1, 8, 8], "classes": ["fruit", "tool"]}
    with pytest.raises(DataError, match="has texts with classes; the model's task is classification"):
        load_data(f"csv:{texts}", TaskSpec(name="classification", options=images))
    with pytest.raises(
        UnsupportedModelError, match=r"takes \(x\); a text classifier takes \(input_ids, attention_mask\)"
    ):
        open_model(ModelRequest("eff.testing.samples:tiny_cnn", data=f"csv:{texts}"), Plugins())


# --- the task


def test_a_model_of_too_few_positions_is_refused(texts):
    data = load_data(f"csv:{texts}?tokenizer=words:5000&max_length=500")
    with pytest.raises(DataError, match="Bag fails on 500 tokens of 'words:5000'"):
        TextClassification.from_spec(data.task).check_fit(Bag(2, words=8), data)


def test_the_metrics_are_those_of_a_classifier(texts):
    data = load_data(f"csv:{texts}")
    task = TextClassification.from_spec(data.task)
    model = Bag()
    batch = data.test.batch(range(16))
    with torch.no_grad():
        output = task.forward(model, batch)
    meter = task.meter()
    meter.update(output, batch)
    expected = 100 * float((output.argmax(1) == batch["label"]).double().mean())
    assert meter.compute().values["accuracy"].value == pytest.approx(expected)
    assert task.loss(output, batch).item() == pytest.approx(meter.compute().values["cross_entropy"].value, rel=1e-5)


def test_padding_changes_no_output(texts):
    data = load_data(f"csv:{texts}?max_length=32")
    task = TextClassification.from_spec(data.task)
    model = Bag()
    batch = data.test.batch(range(4))
    ids, mask = task.module_inputs(batch)
    assert ids.shape == (4, 32)
    torch.testing.assert_close(model(ids, mask), task.forward(model, batch))


def test_a_text_file_is_read_and_an_empty_one_refused(tmp_path):
    task = TextClassification(TextClassificationOptions(classes=("a", "b")))
    (tmp_path / "a.txt").write_text("An apple.", encoding="utf-8")
    assert task.read_input(tmp_path / "a.txt")["input_ids"].shape == (1, 4)
    (tmp_path / "b.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.txt: is empty"):
        task.read_input(tmp_path / "b.txt")


# --- models of transformers


@pytest.fixture
def bert(tmp_path) -> Path:
    """Save a tiny BERT classifier with its tokenizer, as a Hub repository has them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (eff-core[text])")
    folder = tmp_path / "bert"
    folder.mkdir()
    tokenizer_file(folder / "tokenizer.json")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, id2label={0: "tool", 1: "fruit"}, hidden_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_hub_name_with_an_owner_is_a_source_and_no_file():
    assert file_of("hf:owner/name") is None
    assert file_of("models/net.pt") == Path("models/net.pt")
    assert file_of("C:\\net.pt") == Path("C:\\net.pt")


def test_a_transformers_model_brings_tokenizer_and_classes(bert, texts):
    opened = open_model(ModelRequest(f"hf:{bert}", data=f"csv:{texts}?max_length=16"), Plugins())
    assert opened.task.options.tokenizer.startswith(f"hf:{bert}@")
    assert opened.task.options.classes == ("tool", "fruit")
    assert opened.data.test.batch([0])["input_ids"][0, 0] == 2


def test_a_transformers_model_trains_reloads_predicts_and_exports(bert, texts, tmp_path):
    recipe = Recipe(
        model=f"hf:{bert}", data=f"csv:{texts}?max_length=16", device="cpu",
        train=TrainOptions(epochs=20, batch_size=16, lr=0.01, optimizer="adamw"),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    assert report.after.metrics.values["accuracy"].value == 100.0
    (tmp_path / "a.txt").write_text("hammer number 7")
    [prediction] = predict(UseRequest(str(tmp_path / "run"), device="cpu"), [tmp_path / "a.txt"])
    assert prediction.rows[0]["class"] == "tool"


def test_a_text_model_is_exported_to_onnx_with_both_inputs(texts, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs onnxscript (eff-core[onnx])")
    onnx = pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = Path(__file__).read_text(encoding="utf-8").split("class Bag")[1].split("@pytest.fixture")[0]
    (tmp_path / "bag_module.py").write_text("from torch import nn\n\n\nclass Bag" + source)
    recipe = Recipe(
        model="bag_module:bag", data=f"csv:{texts}?max_length=16", device="cpu", train=TrainOptions(epochs=0)
    )
    apply(recipe, tmp_path / "run")
    [artifact] = export_model(UseRequest(str(tmp_path / "run"), device="cpu"), ["onnx"], tmp_path / "out")
    graph = onnx.load(artifact.path).graph
    assert [item.name for item in graph.input] == ["input_ids", "attention_mask"]
    if "agreement" in artifact.details:
        assert artifact.details["agreement"] == 1.0


def test_the_data_name_a_text_task_in_the_spec(texts):
    assert str(DataSpec.parse(str(texts))) == f"csv:{texts}"
