"""quant_hawqv3: dyadic numbers, bitwise equality with the numpy runner and ONNX, the programme, training, bad input."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eff.errors import ConfigError, EffError, RequestError, RunError, UnsupportedModelError
from eff.options import check_config
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Recipe, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, MODEL, blobs
from eff.use import UseRequest, evaluate
from eff_kernels.int_matmul.reference import shift_rounded
from eff_quant_hawqv3.bits import Programme, programme
from eff_quant_hawqv3.claims import brute_force, digits_residual
from eff_quant_hawqv3.config import HAWQV3Config
from eff_quant_hawqv3.dyadic import factor
from eff_quant_hawqv3.network import Layer, Network, simulate
from eff_quant_hawqv3.plan import read_plan
from eff_quant_hawqv3.plugin import HAWQV3
from eff_quant_hawqv3.program import compile_program, write_program
from eff_quant_hawqv3.quantize import ALPHA, TEMPERATURE, distilled
from eff_quant_hawqv3.runner import read_program, run_program
from eff_quant_kit.allocation import Budget

EFF_PLUGIN = "quant_hawqv3"


def test_contract(eff_contract_check):
    eff_contract_check()


@settings(max_examples=200, deadline=None)
@given(
    st.floats(2**-30, 2**10, width=32), st.floats(2**-30, 2**10, width=32), st.integers(-(2**30), 2**30), st.booleans()
)
def test_a_dyadic_number_is_the_ratio_to_31_bits_and_rounds_as_fractions_do(above, below, q, half_even):
    if not 2**-40 < above / below < 2**29:
        return
    m, e = factor(torch.tensor(above), torch.tensor(below), "x")
    exact = Fraction(int(m), 2 ** int(e))
    ratio = Fraction(above) / Fraction(below)
    assert abs(exact - ratio) <= max(ratio / 2**30, Fraction(1, 2**63)) and 1 <= e <= 62 and 0 < m < 2**31
    value = q * exact
    expected = round(value) if half_even else (value + Fraction(1, 2)).__floor__()
    assert int(shift_rounded(torch.tensor([q]), m, e, half_even)) == expected


@pytest.mark.parametrize(("half_even", "expected"), [(False, [-1, 0, 1, 2, 3]), (True, [-2, 0, 0, 2, 2])])
def test_ties_go_up_or_to_even(half_even, expected):
    q = torch.tensor([-3, -1, 1, 3, 5])
    assert shift_rounded(q, torch.tensor(2**30), torch.tensor(31), half_even).tolist() == expected


def test_scales_that_are_dead_or_too_far_apart_are_refused():
    one = torch.tensor(1.0)
    with pytest.raises(RunError, match="fc: dead scale"):
        factor(torch.tensor([1.0, 0.0]), one, "fc")
    with pytest.raises(RunError, match="grows by 1.07e"):
        factor(torch.tensor(2.0**30), one, "fc")
    m, e = factor(torch.tensor([2.0**-70, 2.0**-62]), one, "fc")
    assert m.tolist() == [0, 1] and e.tolist() == [62, 62]


class Many(nn.Module):
    """Every operation that has an integer form."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8)
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, 1, 1)
        self.shared = nn.Conv2d(12, 12, 3, 1, 1)
        self.shared_norm = nn.BatchNorm2d(12)
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
        self.hidden, self.fc = nn.Linear(48, 12), nn.Linear(12, 4)
        self.last_norm = nn.BatchNorm1d(12)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu6(self.depthwise(x))
        a, b = x.chunk(2, 1)
        x = torch.cat([F.relu(self.left(a)), self.right(b).relu()], 1)
        for _ in range(2):
            x = F.relu(self.shared_norm(self.shared(x)) + x)
        x = F.pad(self.mean(self.pool(x)), (0, 1, 1, 0))[:, :, :2, :2]
        x = F.relu(self.last_norm(self.hidden(torch.flatten(x, 1))))
        return self.fc(x)


MODELS = {
    "residual": lambda: digits_residual(num_classes=4),
    "many": Many,
    "mean of a layer": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AvgPool2d(2, 2, 1), nn.Flatten(), nn.Linear(36, 4)
    ),
}


def task():
    options = ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d"), mean=(0.3,), std=(0.25,))
    return Classification(options)


@pytest.fixture
def run():
    recipe = TrainOptions(epochs=1, batch_size=64).over(CORE_TRAINING)
    return Run(task(), torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=recipe, training=True)


def made(name, run, **options):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # as trained ones
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:  # no value of only zeros
            nn.init.uniform_(module.bias, 0, 0.5)
    method = HAWQV3(HAWQV3Config(**{"calibration_samples": 64, "trace_draws": 3, "trace_samples": 64} | options))
    return method.transform(model=model.eval(), run=run).eval(), method


def images(run, samples=48):
    return run.task.module_inputs(next(run.batches("test", samples, samples)))[0]


CASES = [
    ("residual", {"bits": 8}), ("residual", {"bits": 4}), ("residual", {"bits": "mixed", "rounding": "half_even"}),
    ("residual", {"bits": 4, "clip_residual": True, "residual_bits": 8, "bias_bits": 16}),
    ("many", {"bits": 8}), ("many", {"bits": 4, "exclude": ("left",), "percentile_a": 99.9, "percentile_w": 95.0}),
    ("many", {"bits": 8, "rounding": "half_even", "act_momentum": -1}), ("mean of a layer", {"bits": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_runner_gives_every_code_of_the_simulation(name, options, run, tmp_path):
    net, _ = made(name, run, **options)
    x = images(run)
    value, expected = simulate(net, x)
    write_program(net, tmp_path / "model.integer")
    program, tensors = read_program(tmp_path / "model.integer")
    found = {}
    output = run_program(program, tensors, x.numpy(), found)
    assert set(found) == set(expected) and all(codes.dtype.kind == "i" for codes in found.values())
    for step, codes in expected.items():
        np.testing.assert_array_equal(found[step], codes.numpy(), err_msg=step)
    np.testing.assert_array_equal((output * np.array(program["output_scale"])).astype(np.float32), net(x).detach())
    assert len(np.unique(output, axis=0)) > 1  # not all the same
    kinds = {key: array.dtype.kind for key, array in tensors.items()}
    assert set(kinds.values()) <= {"i", "u"}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_onnx_graph_is_integers_between_input_and_output_and_gives_the_same_codes(name, options, run):
    onnx = pytest.importorskip("onnx", reason="the ONNX export needs onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the comparison needs onnxruntime")
    from eff_quant_hawqv3.onnx_graph import onnx_model

    net, _ = made(name, run, **options)
    x = images(run)
    proto = onnx_model(*compile_program(net), x[:1].numpy())
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    output, codes = session.run(None, {"input": x.numpy()})
    np.testing.assert_array_equal(codes, simulate(net, x)[0].x.numpy())
    np.testing.assert_array_equal(output, net(x).detach().numpy())
    inferred = onnx.shape_inference.infer_shapes(proto)
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.output]}
    kinds |= {c.name: c.data_type for c in inferred.graph.initializer}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
    nodes = inferred.graph.node
    start = next(i for i, node in enumerate(nodes) if node.op_type == "Cast")
    end = next(i for i, node in enumerate(nodes) if "codes" in node.output)
    between = [name for node in nodes[start + 1 : end + 1] for name in (*node.input, *node.output)]
    assert between and not [name for name in between if kinds[name] in floats]
    assert {node.op_type for node in nodes} >= {"ConvInteger", "MatMulInteger"}


def test_a_folded_layer_equals_the_layer_and_its_norm():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, 6)
    layer = Layer(conv, norm, 8, False, HAWQV3Config())
    torch.testing.assert_close(layer.real(x, None), norm(conv(x)))
    step = layer.step(conv.weight)
    torch.testing.assert_close(step, conv.weight.abs().amax((1, 2, 3)) / 127)
    assert (layer.quantized(conv.weight) - conv.weight).abs().le(step.view(-1, 1, 1, 1) / 2 + 1e-7).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_network_of_floats_is_the_model_and_training_sees_what_integers_give(name, run):
    net, _ = made(name, run, bits=8)
    torch.manual_seed(0)
    x = images(run)
    net.requires_grad_(False)
    on_integers = net(x)
    net.path = "simulated"
    simulated = net(x)
    net.path = "float"
    plain = net(x)
    spread = float(plain.std())
    assert float((plain - on_integers).abs().mean()) < 0.1 * spread
    assert float((simulated - on_integers).abs().mean()) < 0.03 * spread


def test_gradients_pass_rounding_and_stop_at_the_range(run):
    layer = Layer(nn.Linear(4, 1, bias=False), None, 4, False, HAWQV3Config())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.2, 0.1, 0.7]]))
    layer.quantized(layer.weight).sum().backward()
    assert layer.weight.grad.tolist() == [[1, 1, 1, 1]]
    net, _ = made("residual", run, bits=4)
    net.train()
    batch = next(run.batches("train", 32, 32))
    run.task.loss(run.forward(net, batch), batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_integers_have_the_input_gradient_of_the_fake_quantized_values(name, run):
    net, _ = made(name, run)
    x = images(run, 8)
    plain = net(x)
    x.requires_grad_(True)
    output = net(x)
    assert torch.equal(output, plain)  # the value is that of the integers
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    net.path = "simulated"
    real = net(x)
    (expected,) = torch.autograd.grad((2 * plain.detach() * real).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6) and float(gradient.abs().amax()) > 0


def test_live_norms_follow_the_batches_and_fixed_ones_stay(run):
    for fix in (True, False):
        net, _ = made("residual", run, fix_bn=fix)
        before = [b.clone() for n, b in net.named_buffers() if n.endswith("running_mean")]
        net.train()
        run.forward(net, next(run.batches("train", 32, 32)))
        after = [b for n, b in net.named_buffers() if n.endswith("running_mean")]
        assert all(torch.equal(a, b) == fix for a, b in zip(before, after, strict=True))


def test_ranges_run_with_momentum_or_keep_the_extremes(run):
    net, _ = made("residual", run, act_momentum=0.75)
    name = net.plan.nodes[0].name
    net.observed.zero_()
    net.observe(name, torch.tensor([-1.0, 2.0]))
    net.observe(name, torch.tensor([-3.0, 1.0]))
    assert net.ranges[0].tolist() == [-1.5, 1.75]
    net.config = HAWQV3Config(act_momentum=-1)
    net.observe(name, torch.tensor([0.0, 5.0]))
    assert net.ranges[0].tolist() == [-1.5, 5.0]


def test_the_plan_names_edges_groups_and_what_is_never_negative():
    plan = read_plan(digits_residual(), torch.zeros(2, 1, 8, 8))
    assert plan.edges == ("0.0", "9") and ["3.first.0", "3.shortcut.0"] in plan.groups
    assert plan.norms["3.shortcut.0"] == "3.shortcut.1" and plan.macs["0.0"] == 8 * 9 * 64
    readers = {node.inputs[0] for node in plan.nodes if node.op == "layer" and node.layer not in plan.edges}
    assert readers <= plan.nonnegative


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_programme_equals_brute_force(seed, share):
    draw = np.random.default_rng(seed)
    use = np.array([[count / 2, count] for count in draw.integers(1, 100, 6)], dtype=np.float64)
    cost = np.stack([draw.random(6), draw.random(6) / 100], 1)
    groups, fixed = ((1, 3),), {5: 1}
    low, high = Budget("size", use, 0).interval(groups, fixed)
    problem = Programme(tuple("abcdef"), Budget("size", use, low + share * (high - low)), groups, fixed)
    found = problem.solve(cost)
    best = brute_force(problem, cost)
    assert found.cost == pytest.approx(sum(cost[row, choice] for row, choice in enumerate(best)), abs=1e-9)
    assert found.choices[1] == found.choices[3] and found.choices[5] == 1
    assert found.used["size"] <= problem.budget.limit * (1 + 1e-9)


def test_constraints_limit_what_they_say(run, tmp_path):
    net, method = made("residual", run, bits="mixed", constraint="bops", budget=0.25)
    macs, bits = net.plan.macs, {name: net.layer(name).bits for name in net.plan.layers}
    inner = [name for name in bits if name not in net.plan.edges]
    low, high = (sum(macs[name] * b * b for name in inner) for b in (4, 8))
    assert method.structure["constraint"]["bops_limit"] == pytest.approx(low + 0.25 * (high - low))
    assert sum(macs[name] * bits[name] ** 2 for name in inner) <= low + 0.25 * (high - low)
    assert bits["3.first.0"] == bits["3.shortcut.0"] and bits["0.0"] == bits["9"] == 8
    table = tmp_path / "latency.json"
    times = {name: {"4": 1.0, "8": 2.0} for name in inner}
    table.write_text(json.dumps(times))
    options = {"bits": "mixed", "constraint": "latency", "latency_table": table}
    _, method = made("residual", run, **options)
    assert method.structure["constraint"]["latency_used"] <= 1.5 * len(inner)
    del times[inner[2]]["4"]
    table.write_text(json.dumps(times))
    with pytest.raises(RequestError, match=f"has no time of {inner[2]} at 4 bits"):
        made("residual", run, **options)
    with pytest.raises(RequestError, match="No such file"):
        made("residual", run, **options | {"latency_table": tmp_path / "none.json"})


def test_the_sensitivity_file_stands_for_omega(run, tmp_path):
    net, method = made("residual", run, bits="mixed")
    omega = method.structure["omega"]
    layers = [
        {"layer": name, "parameters": 1, "values": {"hessian": {"4": four, "8": eight}}}
        for name, (four, eight) in omega.items()
    ]
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({"model": "m", "data": "d", "samples": 1, "bits": [4, 8], "layers": layers}))
    other, again = made("residual", run, bits="mixed", sensitivity=path)
    assert again.structure["bits"] == method.structure["bits"] and again.structure["omega"] == omega


def test_distillation_is_the_weighted_sum(run):
    torch.manual_seed(0)
    teacher, student = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    batch = next(run.batches("train", 16, 16))
    loss = distilled(lambda m, b: (run.task.loss(o := run.forward(m, b), b), o), teacher, run)
    total, output = loss(student, batch)
    p = (run.forward(teacher, batch) / TEMPERATURE).softmax(1)
    q = (output / TEMPERATURE).softmax(1)
    expected = ALPHA * TEMPERATURE**2 * (p * (p / q).log()).sum(1).mean() + (1 - ALPHA) * run.task.loss(output, batch)
    torch.testing.assert_close(total, expected)


def test_four_bit_weights_take_half_a_byte_and_the_run_reports_equality(tmp_path):
    recipe = Recipe(
        model=MODEL, data=DATA, methods=(MethodUse(name=EFF_PLUGIN, options={"bits": 4, "distill": True}),), device="cpu",
        train=TrainOptions(epochs=1, batch_size=64), export=("integer", "onnx"),
    )  # fmt: skip
    pytest.importorskip("onnx", reason="the ONNX export needs onnx")
    report = apply(recipe, tmp_path / "run")
    values = report.after.metrics.values
    assert values["equal_codes"].value == values["equal_classes"].value == 100.0
    counts = {"conv1": 72, "conv2": 576, "conv3": 576, "fc": 32}
    size = counts["conv1"] + counts["fc"] + (counts["conv2"] + counts["conv3"]) / 2
    assert values["weight_bytes"].value == size
    artifacts = {item.format: item for item in report.artifacts}
    assert artifacts["integer"].details["weight_bytes"] == size
    assert artifacts["onnx"].details.get("agreement", 1.0) == 1.0
    assert artifacts["onnx"].details.get("max_difference", 0.0) == 0.0
    assert set(json.loads((tmp_path / "run" / "latency.json").read_text())) == set(counts)
    again = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert again.metrics.values["accuracy"].value == values["accuracy"].value


class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x))).softmax(1).flatten(1)


def test_what_has_no_integer_form_is_listed(run):
    with pytest.raises(UnsupportedModelError, match=r"norm \(GroupNorm\), act \(SiLU\), softmax"):
        read_plan(Bad(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(UnsupportedModelError, match="cannot be traced"):
        read_plan(Branching(), torch.zeros(2, 1, 8, 8))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_unfit_requests_are_refused(run):
    signed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ConfigError, match="1 reads '_0', which can be negative.*use exclude=1"):
        HAWQV3(HAWQV3Config(bits=4)).transform(model=signed, run=run)
    with pytest.raises(ConfigError, match="exclude names 'left', which is no layer"):
        HAWQV3(HAWQV3Config(bits="mixed", exclude=("left",))).transform(model=signed, run=run)
    two = nn.Sequential(nn.Conv2d(1, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(RequestError, match="has nothing to choose"):
        HAWQV3(HAWQV3Config(bits="mixed")).transform(model=two, run=run)
    net, _ = made("residual", run)
    with pytest.raises(UnsupportedModelError, match="runs on integers already"):
        HAWQV3().transform(model=net, run=run)
    net.observed.zero_()
    with pytest.raises(RunError, match="has no range"):
        net(images(run))


def test_sums_beyond_32_bits_are_refused(run):
    net, _ = made("residual", run)
    layer = net.layer("9")
    with torch.no_grad():
        layer.bias.fill_(1e9)
    with pytest.raises(RunError, match="9: sums up to .* exceed 32 bits"):
        net(images(run))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_momentum": 2}, "act_momentum must be -1 or between 0 and 1"),
        ({"percentile_w": 50}, "percentile_w must be 0 or between 90 and 100"),
        ({"bits": "mixed", "constraint": "latency"}, "latency and latency_table belong together"),
        ({"bits": 6}, "bits"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(EffError, match=message):
        check_config(EFF_PLUGIN, HAWQV3Config, options)


def test_a_programme_keeps_what_cannot_have_4_bits_at_8(run):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 4),
    )  # fmt: skip
    config = HAWQV3Config(bits="mixed", budget=0.0)
    plan = read_plan(model, torch.zeros(2, 1, 8, 8))
    net = Network(model, plan, dict.fromkeys(plan.layers, 8), config)
    problem = programme(plan, net, config, run)
    assert problem.fixed == {problem.layers.index("3"): 1} and problem.budget.limit == 8 + 16 + 8


def test_a_file_that_is_no_program_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="is no integer program"):
        read_program(tmp_path / "x")
