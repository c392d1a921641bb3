"""quant_lsq: the paper's formulas, its policies, and what it says about bad input."""

import math

import pytest
import torch
from torch import nn

from eff.errors import ConfigError, EffError, NonFiniteLossError, RunError, UnsupportedModelError
from eff.options import check_config
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Recipe, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, MODEL, TinyCNN, blobs
from eff.training import Training, make_optimizer
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.learned_steps import gradient_scale, lsq_plus_weight_step, lsq_step
from eff_quant_kit.quantizer import SMALLEST_SCALE, keep_scales_positive
from eff_quant_lsq.config import LSQConfig
from eff_quant_lsq.diagnostics import step_ratios
from eff_quant_lsq.distill import with_teacher
from eff_quant_lsq.plugin import LSQ

EFF_PLUGIN = "quant_lsq"


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.fixture
def run():
    options = ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d"), mean=(0.3,), std=(0.25,))
    torch.manual_seed(0)
    return Run(Classification(options), torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=CORE_TRAINING)


def transformed(run, model=None, **options):
    method = LSQ(LSQConfig(**options))
    return method.transform(model=model or TinyCNN(), run=run), method


def test_the_initial_step_is_twice_the_mean_magnitude_over_the_root_of_qp():
    assert lsq_step(torch.tensor([1.0, -3.0]), q_max=4).item() == pytest.approx(2 * 2 / 2)
    assert lsq_step(torch.tensor([[1.0, -3.0], [5.0, 5.0]]), 4, axis=0).tolist() == pytest.approx([2.0, 5.0])


def test_the_lsq_plus_weight_step_covers_three_sigma():
    v = torch.tensor([1.0, 3.0])  # mu 2, sigma 1
    assert lsq_plus_weight_step(v, bits=3).item() == pytest.approx(5 / 4)


@pytest.mark.parametrize(("how", "g"), [("lsq", 1 / math.sqrt(100 * 7)), ("sqrt_n", 0.1), ("none", 1.0)])
def test_the_gradient_scale_is_the_one_chosen(how, g):
    assert gradient_scale(LSQConfig(grad_scale=how), 100, 7) == pytest.approx(g)


def test_first_and_last_layer_get_their_own_bits(run):
    model, method = transformed(run, weight_bits=2, act_bits=3)
    layers = quant_layers(model)
    assert {name: layer.weight_quantizer.bits for name, layer in layers.items()} == {
        "conv1": 8,
        "conv2": 2,
        "conv3": 2,
        "fc": 8,
    }
    assert [layer.input_quantizer.bits for layer in layers.values()] == [8, 3, 3, 8]
    assert (method.structure["first"], method.structure["last"]) == ("conv1", "fc")


def test_the_range_of_inputs_follows_the_first_batch(run):
    model, _ = transformed(run)
    signed = {name: layer.input_quantizer.signed for name, layer in quant_layers(model).items()}
    assert signed == {
        "conv1": True,
        "conv2": False,
        "conv3": False,
        "fc": False,
    }  # after ReLU, but the normalised image


@pytest.mark.parametrize(
    ("options", "signed"),
    [
        ({"act_signed": "true"}, True),
        ({"act_signed": "false"}, False),
        ({"offset": True}, False),
        ({"offset": True, "act_signed": "true"}, True),
    ],
)
def test_the_four_lsq_plus_configurations_can_be_reached(run, options, signed):
    model, _ = transformed(run, **options)
    quantizer = quant_layers(model)["conv1"].input_quantizer
    assert quantizer.signed is signed and (quantizer.offset is not None) is bool(options.get("offset"))


def test_input_steps_count_features_per_sample(run):
    model, method = transformed(run)
    quantizer = quant_layers(model)["conv2"].input_quantizer
    assert method.structure["act_count"]["conv2.input_quantizer"] == 8 * 8 * 8
    assert quantizer.grad_scale == pytest.approx(1 / math.sqrt(512 * 15))


def test_null_bits_and_excluded_layers_stay_float(run):
    model, _ = transformed(run, act_bits=None, exclude=("conv2",))
    layers = quant_layers(model)
    assert (
        "conv2" not in layers and layers["conv3"].input_quantizer is None and layers["conv3"].weight_quantizer.bits == 4
    )


def test_per_channel_has_a_step_per_output(run):
    model, _ = transformed(run, per_channel_weight=True)
    quantizer = quant_layers(model)["conv2"].weight_quantizer
    assert quantizer.scale.shape == (8,)
    assert quantizer.grad_scale == pytest.approx(1 / math.sqrt(8 * 9 * 7))


def test_attention_products_are_quantized_when_asked():
    pytest.importorskip("eff_zoo.vit", reason="the transformer is in eff-zoo")
    recipe = Recipe(
        model="zoo:vit_micro",
        data="digits?train=64&test=32",
        methods=(MethodUse(name="quant_lsq", options={"matmuls": True}),),
        train=TrainOptions(epochs=0),
        device="cpu",
    )
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        report = apply(recipe, Path(folder, "run"))
        state = torch.load(Path(folder, "run", "model.pt"), weights_only=True)["state_dict"]
    assert report.after is not None
    assert any("qk_matmul.left_quantizer.scale" in key for key in state) and any(
        "av_matmul.right_quantizer.scale" in key for key in state
    )


def test_minmax_steps_cover_the_whole_range(run):
    model, _ = transformed(run, init="minmax")
    layer = quant_layers(model)["conv2"]
    assert layer.weight_quantizer.scale.item() == pytest.approx(layer.layer.weight.abs().max().item() / 7)


def test_batch_norm_is_taken_afresh_from_training_samples(run):
    model, method = transformed(
        run, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4)), bn_samples=64
    )
    norm, seen = model[1], []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert method.finish(model, run) is model
    assert sum(len(x) for x in seen) == 64
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    kept, method = transformed(run, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
    method.finish(kept, run)
    assert kept[1].running_mean.eq(0).all() and kept[1].num_batches_tracked == 0


def test_a_model_without_batch_norm_is_told_that_there_is_none(run):
    model, method = transformed(run, nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), bn_samples=32)
    method.finish(model, run)
    assert any("bn_samples has no effect" in line for line in run.log.warnings)


@pytest.mark.parametrize("bits", [1, 9, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ConfigError, match=f"quant_lsq: weight_bits must be between 2 and 8, got {bits}"):
        check_config("quant_lsq", LSQConfig, {"weight_bits": bits})


def test_nothing_to_quantize_is_refused(run):
    with pytest.raises(
        UnsupportedModelError,
        match=r"quant_lsq: found no Linear or Conv in Sequential \(1 modules, e.g. '0': Flatten\); nothing to quantize",
    ):
        transformed(run, nn.Sequential(nn.Flatten()))
    with pytest.raises(ConfigError, match="all null; nothing would be quantized"):
        check_config("quant_lsq", LSQConfig, {"weight_bits": None, "act_bits": None, "first_last_bits": None})


def test_an_unknown_layer_in_exclude_gets_a_suggestion(run):
    with pytest.raises(
        ConfigError, match="exclude names 'conv_2', which is no convolution or linear layer; did you mean 'conv2'"
    ):
        transformed(run, exclude=("conv_2",))


def test_zero_weights_start_at_the_floor_with_a_warning(run):
    model = TinyCNN()
    nn.init.zeros_(model.conv2.weight)
    model, _ = transformed(run, model)
    assert quant_layers(model)["conv2"].weight_quantizer.scale.item() == pytest.approx(SMALLEST_SCALE)
    assert any("conv2.weight_quantizer" in line for line in run.log.warnings)
    assert torch.isfinite(run.forward(model, next(run.batches()))).all()


def test_training_that_diverges_says_so_with_its_step_and_keeps_the_last_good_state(tmp_path):
    recipe = Recipe(
        model=MODEL, data=DATA, methods=(MethodUse(name="quant_lsq"),), device="cpu",
        train=TrainOptions(epochs=2, batch_size=64, lr=1e20),
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"at step \d of 8; start again with a smaller --lr"):
        apply(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "resume.pt").exists()


def test_nan_weights_are_refused_with_the_layer(run):
    model = TinyCNN()
    nn.init.constant_(model.conv2.weight, float("nan"))
    with pytest.raises(
        RunError, match=r"conv2\.weight_quantizer: the tensor to initialise from holds NaN|conv3\.input"
    ):
        transformed(run, model)


def test_an_infinite_first_batch_is_refused_with_the_layer(run):
    run.data.train.images.fill_(float("inf"))
    with pytest.raises(RunError, match=r"conv1\.input_quantizer: the first batch holds NaN or infinity"):
        transformed(run)


def test_a_checkpoint_with_other_bits_or_granularity_is_refused(run, tmp_path):
    recipe = Recipe(
        model=MODEL,
        data=DATA,
        methods=(MethodUse(name="quant_lsq", options={"per_channel_weight": True}),),
        train=TrainOptions(epochs=0),
        device="cpu",
    )
    apply(recipe, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    content["eff"]["methods"][0]["config"]["per_channel_weight"] = False
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(EffError, match=r"conv1\.weight_quantizer\.scale' is \(8,\) in the file and \(\) in the model"):
        apply(Recipe(model=str(tmp_path / "other.pt"), train=TrainOptions(epochs=0)), tmp_path / "again")


def test_distillation_adds_the_cross_entropy_to_the_teacher(run):
    batch = next(run.batches())
    student, teacher = TinyCNN().eval(), TinyCNN().eval()
    plain = lambda model, batch: (run.task.loss(run.forward(model, batch), batch), run.forward(model, batch))  # noqa: E731
    hard, output = plain(student, batch)
    total, _ = with_teacher(plain, teacher, run)(student, batch)
    soft = -(run.forward(teacher, batch).softmax(1) * output.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(total, hard + soft)


def test_steps_get_no_weight_decay(run):
    from eff.session import Chosen, Plugins

    model, method = transformed(run)
    plugins = Plugins([Chosen("quant_lsq", "", "", method)], extensions=())
    groups = make_optimizer(model, CORE_TRAINING, plugins).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("scale") else CORE_TRAINING.weight_decay), name


def test_a_step_that_falls_below_zero_is_lifted_and_counted(run):
    model, _ = transformed(run)
    with torch.no_grad():
        quant_layers(model)["conv2"].weight_quantizer.scale.fill_(-1.0)
    assert keep_scales_positive(model) == 1
    assert quant_layers(model)["conv2"].weight_quantizer.scale.item() == pytest.approx(SMALLEST_SCALE)


def test_the_gradient_scale_brings_r_from_far_above_one_to_its_order(run):
    """LSQ sec. 2.2: unscaled, steps would move far faster than weights."""
    model, _ = transformed(run)
    batch = next(run.batches())
    ratios = step_ratios(model, quant_layers(model), lambda: run.task.loss(run.forward(model, batch), batch))
    scaled, unscaled = (sorted(values)[len(values) // 2] for values in zip(*ratios.values(), strict=True))
    assert 0.01 < scaled < 10 and unscaled > 10 * scaled
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weight_decay_follows_the_paper():
    assert [LSQConfig(weight_bits=bits).weight_decay for bits in (2, 3, 4, 8)] == [2.5e-5, 5e-5, 1e-4, 1e-4]


@pytest.mark.parametrize(
    "options", [{}, {"per_channel_weight": True}, {"offset": True}, {"narrow_range": True, "act_bits": 2}], ids=str
)
def test_onnxruntime_and_the_packed_file_give_the_same_predictions(options, tmp_path):
    pytest.importorskip("onnxruntime", reason="running ONNX needs onnxruntime")
    from eff.use import UseRequest, evaluate

    recipe = Recipe(
        model=MODEL,
        data=DATA,
        methods=(MethodUse(name="quant_lsq", options=options),),
        export=("packed", "onnx"),
        train=TrainOptions(epochs=2, batch_size=64),
        device="cpu",
    )
    report = apply(recipe, tmp_path / "run")
    onnx = next(item for item in report.artifacts if item.format == "onnx")
    # A level may flip where onnxruntime sums a convolution in another order and lands on the other side of a tie.
    assert onnx.details["agreement"] >= 0.99 and onnx.details["max_difference"] < 0.5
    packed = evaluate(UseRequest(str(tmp_path / "run" / "model.packed.safetensors"), device="cpu"))
    assert packed.metrics.values["cross_entropy"].value == pytest.approx(
        report.after.metrics.values["cross_entropy"].value, rel=1e-5
    )


def test_eight_bits_learn_from_scratch_like_float(run):
    from eff.session import Chosen, Plugins

    run.train = CORE_TRAINING.model_copy(update={"epochs": 12, "batch_size": 32})
    model, method = transformed(run, weight_bits=8, act_bits=8)
    summary = Training(model, run, Plugins([Chosen("quant_lsq", "", "", method)], extensions=())).run_all()
    assert summary.loss[-1] < 0.8 * summary.loss[0]
