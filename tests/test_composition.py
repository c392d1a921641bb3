"""Which methods go together in one run or one after another, and which are refused with what reason.

A chain that works is checked by what it leaves: each method's own metrics, on a model that reloads.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from eff.errors import EffError
from eff.models import ModelRequest, open_model
from eff.registry import discover
from eff.runner import apply, make_plan
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.session import Plugins
from eff.testing.samples import tiny_cnn
from eff.use import UseRequest, evaluate
from eff_quant_kit.layers import quant_layers

CNN = ("eff.testing.samples:tiny_cnn", "eff.testing.samples:blobs")
VIT = ("zoo:vit_micro?depth=2", "digits?train=128&test=64")
LLAMA = ("zoo:llama_tiny?dim=16&heads=2&kv_heads=1&hidden=32", "corpus?length=48&train=16&test=8")
FEW_CLIENTS = {"rounds": 2, "n_clients": 4, "active_ratio": 0.5, "local_epochs": 1, "batch_size": 16}
OPTIONS = {
    "fl_fedspeed": FEW_CLIENTS,
    "peft_paca": {"r": 4},
    "adv_pma": {"steps": 4, "checks": 0},
    "eval_filter_db": {"figures": False},
    "quant_adaquant": {"bits": [8], "iters": 1, "bias_tuning": False, "calib_size": 32, "batch": 16},
    "quant_gradptq": {"iters": 1, "calib_size": 32, "batch": 16},
    "quant_hawqv3": {"calibration_samples": 32},
    "quant_double_rounding": {"bits": [8, 4]},
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


ATTACKED = ("quant_lsq", "quant_adaquant", "quant_gradptq", "quant_hawqv3", "quant_dfp", "quant_double_rounding")


@pytest.mark.parametrize("method", ATTACKED)
def test_gradients_of_a_quantized_model_reach_its_input_under_attack(method, tmp_path):
    report = apply(recipe(f"{method},adv_pma", CNN), tmp_path / "run")
    values = report.after.metrics.values
    assert values["robust_accuracy"].value <= values["accuracy"].value
    opened = open_model(ModelRequest(str(tmp_path / "run")), Plugins(()))
    batch = opened.data.test.batch(range(16))
    image = batch["image"].requires_grad_(True)
    loss = opened.task.loss(opened.task.forward(opened.model.eval(), batch), batch)
    (gradient,) = torch.autograd.grad(loss, image)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())  # of every sample


def test_integers_are_not_more_robust_than_the_floats_they_stand_for(tmp_path):
    data = "digits?train=600&test=100"
    apply(Recipe(model="zoo:digits_cnn", data=data, train=TrainOptions(epochs=4), device="cpu"), tmp_path / "float")
    uses = [MethodUse(name="quant_hawqv3"), MethodUse(name="adv_pma", options={"steps": 10, "checks": 0, "eps": 0.1})]
    robust = {}
    for name, methods in (("float", uses[1:]), ("integers", uses)):
        attacked = Recipe(
            model=str(tmp_path / "float"), data=data, methods=tuple(methods), train=TrainOptions(epochs=0), device="cpu"
        )
        report = apply(attacked, tmp_path / f"attacked {name}")
        robust[name] = report.after.metrics.values["robust_accuracy"].value
    # 8-bit rounding moves a few margins of 100 images; without gradients the attack would find next to nothing.
    assert robust["integers"] <= robust["float"] + 10, robust


QUANTIZERS = sorted(row.name for row in discover() if row.name.startswith("quant_") and row.status == "ok")


OF_OTHER_THINGS = {"quant_biadapter", "quant_vqgan_lc", "quant_zipcache"}
"""Adapters, latents, a cache: none of these quantizes what another does."""
PAIRS = [pair for pair in itertools.combinations(QUANTIZERS, 2) if not set(pair) <= OF_OTHER_THINGS]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_quantizers_are_refused_in_one_run(first, second):
    for names in (f"{first},{second}", f"{second},{first}"):
        with pytest.raises(EffError, match=f"{first}|{second}"):
            make_plan(recipe(names, CNN))


PRUNED = {  # symmetric grids and integer zero points hold 0; steps on the weights themselves may still leave it
    "quant_lsq": {"weight_bits": 4},
    "quant_adaquant": OPTIONS["quant_adaquant"] | {"pipeline": "light"},
    "quant_gradptq": {"iters": 20, "calib_size": 32, "batch": 16},
}


@pytest.mark.parametrize("method", PRUNED)
def test_pruned_weights_are_still_zero_after_quantization(method, tmp_path):
    model = tiny_cnn()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    for layer in layers.values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
        prune.remove(layer, "weight")
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    given = Recipe(
        model=str(tmp_path / "pruned.pt"), arch=CNN[0], data=CNN[1], device="cpu",
        methods=(MethodUse(name=method, options=PRUNED[method]),),
        train=TrainOptions(epochs=None if method == "quant_gradptq" else 0),
    )  # fmt: skip
    apply(given, tmp_path / "run")
    quantized = quant_layers(open_model(ModelRequest(str(tmp_path / "run")), Plugins(())).model)
    assert quantized.keys() == layers.keys()
    for name, layer in layers.items():
        zero, weight = layer.weight == 0, quantized[name].weight()
        assert bool(zero.any()) and not bool(weight[zero].any()), name
        assert bool(weight[~zero].any()), name


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


def test_a_detector_takes_learned_steps_instead_of_its_own_quantizers(tmp_path):
    source = ("codenet:small?width=4,8,8&blocks=1&decoder=8&head=4", "scenes?train=16&test=8&size=32")
    report = apply(recipe("quant_lsq", source), tmp_path / "quantized")
    found = evaluate(UseRequest(str(tmp_path / "quantized"), device="cpu"))
    assert found.metrics.values["detection_loss"] == report.after.metrics.values["detection_loss"]
    again = recipe("quant_codenet", (str(tmp_path / "quantized"), source[1]))
    with pytest.raises(EffError, match="quant_codenet conflicts with quant_lsq, which has been applied to it"):
        apply(again, tmp_path / "twice")


def test_an_autoencoder_with_quantized_weights_becomes_a_tokenizer_in_a_second_run(tmp_path):
    blobs = "pictures:eff.testing.samples:blobs?train=64&test=32"
    apply(recipe("quant_lsq", ("vqgan:tiny", blobs)), tmp_path / "quantized")
    options = {
        "n_codes": 16, "code_dim": 4, "table": "random", "features": "eff.testing.samples:tiny_cnn", "feature_layer": "conv2",
        "feature_size": None, "pool": 2, "rate_p": 0, "rate_d": 0,
    }  # fmt: skip
    second = recipe("quant_vqgan_lc", (str(tmp_path / "quantized"), blobs))
    use = MethodUse(name="quant_vqgan_lc", options=options)
    report = apply(second.model_copy(update={"methods": (use,)}), tmp_path / "tokenizer")
    assert [item.name for item in report.methods] == ["quant_lsq", "quant_vqgan_lc"]
    found = evaluate(UseRequest(str(tmp_path / "tokenizer"), device="cpu"))
    assert found.metrics.values["psnr"] == report.after.metrics.values["psnr"]
    assert found.metrics.values["test_utilisation"].value > 0


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
