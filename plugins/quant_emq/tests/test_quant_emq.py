"""quant_emq: operators, expressions, screening, the table, exact assignment, and bad input."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from eff.errors import ConfigError, RequestError, UnsupportedModelError
from eff.options import check_config
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Recipe, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, blobs
from eff_quant_emq import claims
from eff_quant_emq.assign import assign
from eff_quant_emq.bench import Table, build, check, configurations, partial_correlation, rank_correlation
from eff_quant_emq.claims import pick
from eff_quant_emq.config import EMQConfig
from eff_quant_emq.evolve import INVALID, Evolution
from eff_quant_emq.expressions import RELEASED, crossed, layer_scores, mutated, random_genes, simplified
from eff_quant_emq.inputs import HAND_MADE, choose_layers, collect, hand_made
from eff_quant_emq.operators import BINARY, UNARY
from eff_quant_emq.plugin import EMQ
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.sensitivity import rounded

EFF_PLUGIN = "quant_emq"


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.mark.parametrize("name", UNARY)
def test_operators_give_numbers_where_they_should_and_never_write_to_their_input(name):
    x = torch.tensor([[-2.0, 0.0], [0.5, 3.0]])
    kept = x.clone()
    y = UNARY[name](x)
    assert torch.equal(x, kept) and torch.isfinite(y).all()
    UNARY[name](torch.tensor(2.0))


def test_operators_by_hand():
    x = torch.tensor([-2.0, 0.0, 4.0])
    assert UNARY["abslog"](x).tolist() == pytest.approx([np.log(2), 0, np.log(4)])
    assert UNARY["sqrt"](x).tolist() == [0, 0, 2] and float(UNARY["l1_norm"](x)) == 2
    assert float(UNARY["normalized_sum"](x)) == pytest.approx(2 / 3) and float(
        UNARY["frobenius_norm"](x)
    ) == pytest.approx(20**0.5)
    assert float(UNARY["normalize"](x).std()) == pytest.approx(1) and len(UNARY) == 18 and len(BINARY) == 4


INPUTS = {
    "weight": [torch.randn(3, 4, generator=torch.Generator().manual_seed(index)) for index in range(4)],
    "grad": [torch.randn(3, 4, generator=torch.Generator().manual_seed(10 + index)) for index in range(4)],
}


def tree(unary=(("no_op", "no_op"), ("no_op", "no_op")), binary="sum", inputs=("weight", "grad")):
    return {"structure": "tree", "sign": 1, "inputs": list(inputs), "unary": [list(c) for c in unary], "binary": binary}


def test_a_tree_is_its_formula():
    genes = tree((("abs", "square"), ("revert", "exp")), "difference")
    expected = [
        w.abs().square().mean() - (-g).exp().mean() for w, g in zip(INPUTS["weight"], INPUTS["grad"], strict=True)
    ]
    torch.testing.assert_close(layer_scores(genes, INPUTS), torch.stack(expected).double())
    torch.testing.assert_close(layer_scores({**genes, "sign": -1}, INPUTS), -torch.stack(expected).double())


def test_linear_and_graph_by_hand():
    linear = {
        "structure": "linear",
        "sign": 1,
        "inputs": ["weight"],
        "unary": [["abs", "sqrt", "no_op", "square"]],
        "binary": "sum",
    }
    expected = torch.stack([w.abs().sqrt().square().mean() for w in INPUTS["weight"]]).double()
    torch.testing.assert_close(layer_scores(linear, INPUTS), expected)
    chains = [["abs", "no_op"], ["no_op", "no_op", "revert"], ["no_op"] * 4]
    graph = {"structure": "graph", "sign": 1, "inputs": ["weight", "grad"], "unary": chains, "binary": "sum"}
    found = layer_scores(graph, INPUTS)
    for value, w, g in zip(found, INPUTS["weight"], INPUTS["grad"], strict=True):
        one = w.abs().mean() + g.mean()
        two = w.mean() + g.mean() - one
        three = w.mean() + g.mean() + one + two
        assert float(value) == pytest.approx(float((one + two + three) / 3), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), structure=st.sampled_from(["tree", "linear", "graph"]))
def test_equal_texts_give_equal_scores_and_children_keep_the_shape(seed, structure):
    config, rng = EMQConfig(structure=structure, p_mut=0.5), random.Random(seed)
    one, other = (random_genes(["grad", "weight"], config, rng) for _ in range(2))
    child = mutated(crossed(one, other, rng), ["grad", "weight"], config, rng)
    assert [len(chain) for chain in child["unary"]] == [len(chain) for chain in one["unary"]]
    padded = {**one, "unary": [[*chain] for chain in one["unary"]]}
    if structure == "tree" and one["unary"][0][1] == "no_op":
        padded["unary"][0] = ["no_op", one["unary"][0][0]]
        assert simplified(padded) == simplified(one)
    if simplified(padded) == simplified(one):
        torch.testing.assert_close(layer_scores(padded, INPUTS), layer_scores(one, INPUTS), equal_nan=True)


def test_simplification_knows_its_identities():
    assert simplified(tree((("revert", "revert"), ("no_op", "no_op")))) == simplified(tree())
    assert simplified(tree((("square", "abs"), ("no_op", "no_op")))) == simplified(
        tree((("square", "no_op"), ("no_op", "no_op")))
    )
    assert simplified(tree((("abs", "square"), ("no_op", "no_op")))) != simplified(tree())


def table(seed=0, rows=60):
    generator = np.random.default_rng(seed)
    bits = generator.choice([2.0, 3.0, 4.0], (rows, 4))
    truth = torch.stack([w.abs().mean() for w in INPUTS["weight"]]).numpy()
    return Table(bits, bits @ truth + 0.02 * generator.normal(size=rows))


def test_fitness_is_spearmans_rho_and_a_negative_one_turns_the_sign():
    evolution = Evolution(INPUTS, table(), EMQConfig(screening=False))
    genes = tree((("abs", "no_op"), ("no_op", "no_op")), "sum", ("weight", "weight"))
    scores = layer_scores(genes, INPUTS).numpy()
    rho, _, signed = evolution.fitness(genes)
    assert rho == pytest.approx(abs(stats.spearmanr(table().bits @ scores, table().quality).statistic))
    turned = tree((("abs", "revert"), ("no_op", "revert")), "sum", ("weight", "weight"))
    again, _, other = evolution.fitness(turned)
    assert again == pytest.approx(rho) and other["sign"] == -signed["sign"]


def test_screening_rejects_what_is_broken_constant_or_known():
    evolution = Evolution(INPUTS, table(), EMQConfig())
    zero = tree((("relu", "revert"), ("no_op", "no_op")), "product", ("weight", "weight"))
    zero["unary"] = [["square", "relu"], ["square", "revert"]]
    exploding = tree((("exp", "exp"), ("no_op", "no_op")))
    big = {**INPUTS, "weight": [w * 100 for w in INPUTS["weight"]]}
    assert Evolution(big, table(), EMQConfig()).fitness(exploding)[0] == INVALID
    good = tree((("abs", "no_op"), ("abs", "no_op")), "sum", ("weight", "weight"))
    first = evolution.fitness(good)[0]
    assert first > 0.8 and evolution.full == 1
    assert (
        evolution.fitness({**good, "unary": [["no_op", "abs"], ["abs", "no_op"]]})[0] == first and evolution.full == 1
    )
    assert evolution.fitness(tree((("abs", "abs"), ("relu", "no_op")), "sum", ("weight", "weight")))[0] <= 1
    flat = {**INPUTS, "weight": [torch.ones(2)] * 4}
    assert Evolution(flat, table(), EMQConfig()).fitness(tree(inputs=("weight", "weight")))[0] == INVALID


def test_evolution_finds_the_truth_and_resumes():
    config = EMQConfig(population=12)
    whole = Evolution(INPUTS, table(), config)
    whole.fill(random.Random(0))
    assert len(whole.population) == 12
    start = whole.population[0][0]
    state = None
    for index in range(40):
        if index == 20:
            state = {
                key: list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
                for key, value in whole.state_dict().items()
            }
        whole.step(random.Random(index))
    again = Evolution(INPUTS, table(), config)
    again.load_state_dict(state)
    for index in range(20, 40):
        again.step(random.Random(index))
    assert again.population == whole.population and whole.population[0][0] >= start
    assert whole.history == sorted(whole.history)


def test_correlations_against_scipy():
    found = table()
    score = found.bits.sum(1)
    assert rank_correlation(score, found.quality) == pytest.approx(stats.spearmanr(score, found.quality).statistic)
    best = np.argsort(-found.quality, kind="stable")[:30]
    assert rank_correlation(score, found.quality, 0.5) == pytest.approx(
        stats.spearmanr(score[best], found.quality[best]).statistic
    )
    assert np.isnan(partial_correlation(score, found.quality, score)) and np.isnan(
        rank_correlation(np.ones(60), found.quality)
    )
    r = {name: stats.rankdata(v) for name, v in (("a", score), ("b", found.quality), ("c", found.bits[:, 0]))}
    ab, ac, bc = (np.corrcoef(r[x], r[y])[0, 1] for x, y in ("ab", "ac", "bc"))
    expected = (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
    assert partial_correlation(score, found.quality, found.bits[:, 0]) == pytest.approx(expected)


def net():
    torch.manual_seed(0)
    layers = []
    for before, after in ((1, 3), (3, 4), (4, 4), (4, 4)):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 4))


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d")))
    return Run(
        task, torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=TrainOptions(epochs=1).over(CORE_TRAINING)
    )


def test_small_spaces_are_measured_whole_and_the_model_stays_as_it_was(run):
    model = net()
    names, fixed = choose_layers(model, run)
    assert names == ["2", "4", "6"] and fixed == ["0", "9"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = EMQConfig(bench_samples=32)
    found = build(model, names, fixed, config, run)
    assert found.bits.shape == (27, 3) and len({tuple(row) for row in found.bits}) == 27
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    row = found.bits[5]
    for name, b in [*zip(names, row, strict=True), *((name, 8) for name in fixed)]:
        layer = model.get_submodule(name)
        layer.weight.data = rounded(layer.weight.data, int(b))
    batch = next(run.batches("train", 32, 256))
    with torch.no_grad():
        assert -float(run.task.loss(run.forward(model.eval(), batch), batch)) == pytest.approx(
            found.quality[5], rel=1e-5
        )
    assert len(configurations(8, EMQConfig(bench_size=40), run)) == 40


def test_inputs_are_aligned_with_their_layers(run):
    model = net()
    names, _ = choose_layers(model, run)
    found = collect(model, names, EMQConfig(batch_size=16), run)
    for index, name in enumerate(names):
        weight = model.get_submodule(name).weight
        assert torch.equal(found["weight"][index], weight) and found["grad"][index].shape == weight.shape
    batch = next(run.batches("train", 16, 16))
    loss = run.task.loss(run.forward(model.eval(), batch), batch)
    torch.testing.assert_close(found["grad"][1], torch.autograd.grad(loss, model[4].weight)[0])
    assert not model[2]._forward_hooks
    released = collect(model, names, EMQConfig(batch_size=16, align_gradients=False), run)
    assert torch.equal(released["grad"][0], found["grad"][2])
    known = hand_made(model, names, found, EMQConfig(batch_size=16), run)
    assert set(known) == set(HAND_MADE)
    assert float(known["snip"][0]) == pytest.approx(float((found["grad"][0] * found["weight"][0]).abs().sum()))
    assert torch.isfinite(layer_scores(RELEASED, found)).all()


def test_the_place_of_a_pick_counts_better_ones_within_the_size():
    bits = np.array([[2.0, 4.0], [4.0, 2.0], [3.0, 3.0], [4.0, 4.0], [2.0, 2.0]])
    found = Table(bits, np.array([0.4, 0.3, 0.2, 1.0, 0.1]))  # the fourth is best and too large
    scores = {(1.0, 0.0): 25.0, (0.0, 1.0): 0.0, (-1.0, -1.0): 75.0}
    assert {key: pick(found, np.array(key), np.ones(2)) for key in scores} == scores


def test_the_exhaustive_claim_measures_every_configuration(monkeypatch):
    small = EMQConfig(population=10, iterations=3, bench_samples=32, batch_size=16, bits=(2, 4))
    monkeypatch.setattr(claims, "CONFIG", small)
    monkeypatch.setattr(claims, "EPOCHS", 1)
    found = claims._exhaustive(0)
    assert found["configurations"] == 2**6 and found["best_hand_made"] >= found["snip"]
    assert all(-1 <= found[f"{name}_tau"] <= 1 and 0 <= found[f"{name}_pick"] < 100 for name in ("evolved", "size"))


@pytest.mark.parametrize("budget", [0.45, 0.6])
def test_bits_are_those_of_the_best_enumeration(run, budget):
    model = net()
    names, fixed = choose_layers(model, run)
    scores = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    config = EMQConfig(budget=budget)
    numel = {name: model.get_submodule(name).weight.numel() for name in (*names, *fixed)}
    limit = budget * sum(numel.values())
    rest = sum(numel[name] for name in fixed)
    if rest + sum(numel[name] * 2 / 8 for name in names) > limit:
        with pytest.raises(RequestError, match="quant_emq"):
            assign(model, names, fixed, scores, config)
        return
    found = assign(model, names, fixed, scores, config)
    best = max(
        (sum(b * float(s) for b, s in zip(bits, scores, strict=True)), bits)
        for bits in itertools.product((2, 3, 4), repeat=3)
        if rest + sum(numel[name] * b / 8 for name, b in zip(names, bits, strict=True)) <= limit
    )
    assert sum(found[name] * float(s) for name, s in zip(names, scores, strict=True)) == pytest.approx(best[0])
    assert found["0"] == found["9"] == 8


def test_a_preset_needs_no_search_and_its_bits_are_in_the_model(tmp_path):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    recipe = Recipe(
        model="zoo:digits_cnn", data="digits?train=128&test=64", device="cpu", export=("packed",),
        methods=(MethodUse(name=EFF_PLUGIN, options={"preset": "snip", "bench_samples": 64}),),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    tables = report.after.metrics.tables
    assert {row["proxy"] for row in tables["proxies"]} == {"in use", *HAND_MADE, "bit sum", "size"}
    assert tables["proxies"][0]["proxy"] == "in use"
    assert {row["bits"] for row in tables["bits"]} <= {2, 3, 4, 8} and (tmp_path / "run" / "proxy.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [4]}, "bits must name at least two widths"),
        ({"topk": [0.0]}, "topk must hold shares above 0"),
        ({"population": 5}, "population must be at least 10, got 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_emq", EMQConfig, options)


def test_unfit_models_and_tables_are_refused(run):
    with pytest.raises(UnsupportedModelError, match="0 layers between its first and its last; at least 2 are needed"):
        choose_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4)), run)
    with pytest.raises(RequestError, match="equally good; nothing can be ranked"):
        check(Table(np.ones((3, 2)), np.ones(3)), 2)
    with pytest.raises(RequestError, match="configurations name 2 layers, the model has 5"):
        check(Table(np.ones((3, 2)), np.arange(3.0)), 5)


def test_linear_layers_stand_in_where_there_are_no_convolutions(run):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert choose_layers(model, run)[0] == ["2", "3"]
    changed = EMQ(EMQConfig(preset="snip", bench_samples=32, budget=1.0)).transform(model=model, run=run)
    assert len(quant_layers(changed)) == 4
