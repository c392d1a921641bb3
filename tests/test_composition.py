"""Which methods go together in one run or one after another, and which are refused with what reason.

A chain that works is checked by what it leaves: each method's own metrics, on a model that reloads.
"""

import pytest
import torch

from eff.errors import EffError
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.use import UseRequest, evaluate

CNN = ("eff.testing.samples:tiny_cnn", "eff.testing.samples:blobs")
VIT = ("zoo:vit_micro?depth=2", "digits?train=128&test=64")
LLAMA = ("zoo:llama_tiny?dim=16&heads=2&kv_heads=1&hidden=32", "corpus?length=48&train=16&test=8")
FEW_CLIENTS = {"rounds": 2, "n_clients": 4, "active_ratio": 0.5, "local_epochs": 1, "batch_size": 16}
OPTIONS = {
    "fl_fedspeed": FEW_CLIENTS,
    "peft_paca": {"r": 4},
    "adv_pma": {"steps": 4, "checks": 0},
    "eval_filter_db": {"figures": False},
}


def recipe(names, source, **changes):
    model, data = source
    uses = tuple(MethodUse(name=name, options=OPTIONS.get(name, {})) for name in names.split(","))
    train = changes.pop(
        "train", TrainOptions(epochs=2 if "fl_" in names else 1, batch_size=None if "fl_" in names else 32)
    )
    return Recipe(model=model, data=data, methods=uses, train=train, device="cpu", **changes)


WORKS = [
    # chain, model and data, a metric of each method
    ("quant_lsq,fl_fedspeed", CNN, ("mean_weight_bits", "sharpness")),
    ("quant_lsq,peft_paca", VIT, ("mean_weight_bits", "trainable_parameters")),
    ("quant_lsq,train_adamp", CNN, ("mean_weight_bits", "weight_norm")),
    ("quant_lsq,eval_filter_db", CNN, ("mean_weight_bits", "filter_variance_entropy")),
    ("quant_lsq,adv_pma", CNN, ("mean_weight_bits", "robust_accuracy")),
    ("fl_fedspeed,adv_pma", CNN, ("sharpness", "robust_accuracy")),
    ("peft_paca,adv_pma", VIT, ("trainable_parameters", "robust_accuracy")),
    ("quant_lsq,fl_fedspeed,adv_pma", CNN, ("mean_weight_bits", "sharpness", "robust_accuracy")),
    ("peft_paca,fl_fedspeed", VIT, ("trainable_parameters", "sharpness")),
    ("peft_paca,train_adamp", VIT, ("trainable_parameters", "weight_norm")),
]


@pytest.mark.parametrize(("names", "source", "metrics"), WORKS, ids=[row[0] for row in WORKS])
def test_a_chain_across_families_works_and_reloads(names, source, metrics, tmp_path):
    report = apply(recipe(names, source), tmp_path / "run")
    assert [item.name for item in report.methods] == names.split(",")
    for name in metrics:
        assert name in report.after.metrics.values, f"{name} is missing in {list(report.after.metrics.values)}"
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert again.metrics.values["accuracy"] == report.after.metrics.values["accuracy"]


REFUSED = [
    # chain, model and data, the reason and the way out
    ("peft_paca,quant_lsq", VIT, "would cut off its training; name that method before peft_paca"),
    ("quant_lsq,restore_deanet", CNN, "restore_deanet conflicts with quant_lsq"),
    ("fl_fedspeed,peft_paca", VIT, "name the federated method last"),
    ("nas_tangle,peft_paca", CNN, "nas_tangle conflicts with peft_paca"),
    ("nas_tangle,fl_fedspeed", CNN, "nas_tangle conflicts with fl_fedspeed"),
    ("quant_lsq,nas_tangle", CNN, "nas_tangle conflicts with quant_lsq"),
    ("fl_fedspeed,train_adamp", CNN, "name the federated method last"),
    ("quant_lsq,quant_lsq", CNN, "quant_lsq is named twice"),
]


def test_a_cache_is_compressed_behind_quantized_weights(tmp_path):
    apply(recipe("quant_lsq", LLAMA), tmp_path / "weights")
    report = apply(recipe("quant_zipcache", (str(tmp_path / "weights"), LLAMA[1])), tmp_path / "run")
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert {"mean_weight_bits", "cache_kl"} <= again.metrics.values.keys()
    assert again.metrics.values["perplexity"] == report.after.metrics.values["perplexity"]


@pytest.mark.parametrize(("names", "source", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_chain_that_cannot_work_is_refused_with_its_reason(names, source, reason, tmp_path):
    with pytest.raises(EffError, match=reason) as caught:
        apply(recipe(names, source), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_folded_restoration_network_is_quantized_in_a_second_run(tmp_path):
    photos = ("deanet:tiny", "eff_restore_kit.samples:scenes")
    apply(recipe("restore_deanet", photos, train=TrainOptions(epochs=0)), tmp_path / "folded")
    again = (str(tmp_path / "folded"), photos[1])
    report = apply(recipe("quant_lsq", again, train=TrainOptions(epochs=0)), tmp_path / "quantized")
    assert report.after.metrics.values["mean_weight_bits"].value < 5
    found = evaluate(UseRequest(str(tmp_path / "quantized"), device="cpu"))
    assert found.metrics.values["psnr"] == report.after.metrics.values["psnr"]
    distilled = recipe("quant_lsq", again)
    use = MethodUse(name="quant_lsq", options={"distill": True})
    with pytest.raises(EffError, match="distill=true needs a classifier; this model's task is restoration"):
        apply(distilled.model_copy(update={"methods": (use,)}), tmp_path / "distilled")


def test_clients_of_an_adapted_model_send_only_what_it_trains(tmp_path):
    report = apply(recipe("peft_paca,fl_fedspeed", VIT), tmp_path / "run")
    trained = report.after.metrics.values["trainable_parameters"].value
    assert trained < 0.5 * report.after.parameters
    for row in report.after.metrics.tables["rounds"]:
        assert row["up"] == row["down"] == 4 * trained * row["drawn"]  # float32
    apply(recipe("peft_paca", VIT, train=TrainOptions(epochs=0)), tmp_path / "start")
    start, end = (
        torch.load(tmp_path / name / "model.pt", weights_only=True)["state_dict"] for name in ("start", "run")
    )
    assert 0 < sum(int((start[key] != end[key]).sum()) for key in start) <= trained
