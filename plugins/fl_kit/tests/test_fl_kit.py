import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eff.data import Data
from eff.errors import DataError, RequestError, RunError, UnsupportedModelError
from eff.hookspecs import hookimpl
from eff.run import Run, Step
from eff.schemas import CORE_TRAINING, DataSpec, TaskSpec, TrainOptions
from eff.session import Chosen, Plugins
from eff_fl_kit import partitions
from eff_fl_kit.baselines import AveragingConfig, FedAvg, FedDyn, FedDynConfig, Scaffold
from eff_fl_kit.config import FederatedConfig
from eff_fl_kit.flat import flat_weights, flattened, frozen_statistics, load_flat_weights, trained_parameters
from eff_fl_kit.local import ascent_gradient
from eff_fl_kit.plugin import FLKit
from eff_fl_kit.protocol import Client, Server, Update, bytes_of
from eff_fl_kit.rounds import Federation, check_request, local_rate
from eff_fl_kit.sampling import draw_clients

PLAIN = {"weight_decay": 0.0, "max_norm": 0.0, "lr_decay": 1.0, "partition": "iid"}


class Points:
    """Random points with one of three labels."""

    def __init__(self, samples=60, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 4, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, 3, (samples,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, generator=None):
        chosen = torch.as_tensor(list(indices))
        return {"x": self.x[chosen], "label": self.labels[chosen]}

    def fingerprint(self):
        return "points"


def cross_entropy(model, batch):
    output = model(batch["x"])
    return F.cross_entropy(output, batch["label"]), output


def linear(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Linear(4, 3).to(dtype)


def make_run(method, split=None, precision="fp32"):
    plugins = Plugins([Chosen("fl_test", "", "", method)], extensions=[("fl_kit", FLKit())])
    data = Data(DataSpec(scheme="points"), TaskSpec(), train=split or Points())
    train = method.training().over(CORE_TRAINING)
    return Run(None, torch.device("cpu"), 0, data, train=train, precision=precision, hook=plugins.hook, training=True)


def federate(method, model, rounds, loss=cross_entropy, split=None):
    """Run rounds without core's loop."""
    run = make_run(method, split)
    method.federation = Federation(method, run)
    for index in range(rounds):
        step = Step(
            model=model, module=model, batch={}, optimizer=None, run=run, index=index, epoch=index, loss=loss,
            backward=torch.Tensor.backward,
        )  # fmt: skip
        run.hook.train_step(step=step)
    return run


def make_client(method, model, loss=cross_entropy, run=None):
    run = run or make_run(method)
    flat = model if hasattr(model, "weights") else None
    return Client(
        0, 0, flat, {"weights": flat.weights.clone()}, {}, torch.arange(60), 0.1, method.config, run, loss,
        torch.Tensor.backward, torch.Generator().manual_seed(0),
    )  # fmt: skip


# --- partitions


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=200),
    clients=st.integers(1, 12),
    concentration=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_a_dirichlet_division_holds_every_sample_once(labels, clients, concentration, seed):
    import numpy as np

    parts = partitions.dirichlet_parts(torch.tensor(labels), clients, concentration, np.random.default_rng(seed))
    assert len(parts) == clients
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))


@settings(max_examples=60, deadline=None)
@given(clients=st.integers(1, 8), shards=st.integers(1, 4), per_shard=st.integers(3, 10), seed=st.integers(0, 99))
def test_a_shard_division_is_complete_even_and_gives_each_client_few_labels(clients, shards, per_shard, seed):
    import numpy as np

    samples = clients * shards * per_shard
    labels = torch.arange(10).repeat_interleave(-(-samples // 10))[:samples]
    parts = partitions.shard_parts(labels, clients, shards, np.random.default_rng(seed))
    assert torch.cat(parts).sort().values.tolist() == list(range(samples))
    assert {len(part) for part in parts} == {shards * per_shard}
    # A piece touches at most as many labels as class borders fall into it, plus one.
    most = shards * (2 + per_shard // max(1, -(-samples // 10)))
    assert all(len(labels[part].unique()) <= most for part in parts)


@given(samples=st.integers(1, 100), clients=st.integers(1, 12))
def test_iid_parts_are_complete_and_of_equal_size(samples, clients):
    import numpy as np

    parts = partitions.iid_parts(samples, clients, np.random.default_rng(0))
    assert torch.cat(parts).sort().values.tolist() == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_concentration_goes_from_one_client_per_class_to_equal_shares():
    import numpy as np

    labels = torch.arange(4).repeat_interleave(100)

    def largest_share(concentration):
        parts = partitions.dirichlet_parts(labels, 5, concentration, np.random.default_rng(1))
        counts = torch.stack([torch.bincount(labels[part], minlength=4) for part in parts])
        return (counts.max(0).values / 100).mean().item()

    assert largest_share(1e-3) == 1.0
    assert largest_share(1e4) == pytest.approx(0.2, abs=0.02)
    assert largest_share(1e4) < largest_share(1.0) < largest_share(0.1)


def test_the_same_seed_divides_alike_and_another_does_not():
    config, split = FederatedConfig(n_clients=5), Points()
    first, again, other = (partitions.divide(split, config, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_more_clients_than_samples_are_refused():
    with pytest.raises(
        DataError, match="60 training samples cannot be divided into 61 clients; use a smaller n_clients"
    ):
        partitions.divide(Points(), FederatedConfig(n_clients=61), 0)
    with pytest.raises(DataError, match="cannot be divided into 80 shards"):
        partitions.divide(Points(), FederatedConfig(n_clients=40, partition="shards"), 0)


def test_data_without_labels_can_only_be_divided_iid():
    split = Points()
    del split.labels
    split.__class__ = type(
        "Bare", (Points,), {"__len__": lambda self: 60, "batch": lambda self, i, g=None: {"x": self.x}}
    )
    with pytest.raises(DataError, match="partition=dirichlet needs one class label per sample.*use partition=iid"):
        partitions.divide(split, FederatedConfig(n_clients=3), 0)
    assert len(partitions.divide(split, FederatedConfig(n_clients=3, partition="iid"), 0)) == 3


# --- sampling


@settings(max_examples=50, deadline=None)
@given(able=st.lists(st.booleans(), min_size=1, max_size=20), ratio=st.floats(0.01, 1), fixed=st.booleans())
def test_only_able_clients_are_drawn_and_never_none(able, ratio, fixed):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor(able)
    if not mask.any():
        with pytest.raises(ValueError, match="no client"):
            draw_clients(mask, ratio, fixed, generator)
        return
    drawn = draw_clients(mask, ratio, fixed, generator)
    assert drawn and drawn == sorted(set(drawn)) and mask[drawn].all()
    if fixed:
        assert len(drawn) == max(1, min(round(ratio * len(able)), sum(able)))


def test_independent_draws_have_the_stated_probability():
    generator = torch.Generator().manual_seed(0)
    able = torch.ones(100, dtype=torch.bool)
    drawn = [len(draw_clients(able, 0.1, False, generator)) for _ in range(400)]
    assert sum(drawn) / 400 == pytest.approx(10, abs=0.5)  # three standard errors are 0.45
    assert len(set(drawn)) > 5


# --- the flat view


def test_the_flat_vector_is_the_model_and_holds_only_what_is_trained():
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(3, 2).double())
    model[0].weight.requires_grad_(False)
    assert list(trained_parameters(model)) == ["0.bias", "2.weight", "2.bias"]
    frozen = model[0].weight.clone()
    with flattened(model) as flat:
        assert len(flat.weights) == 3 + 6 + 2
        flat.weights.fill_(0.5)
        assert (model[2].weight == 0.5).all()
        model(torch.ones(1, 4).double()).sum().backward()
        assert flat.gradient[-2:].tolist() == [1.0, 1.0]
    assert torch.equal(model[0].weight, frozen)
    model[2].weight.data.add_(1)  # has its own memory again
    assert model[0].bias.tolist() == [0.5] * 3 and model[2].bias.grad is None


def test_loading_flat_weights_undoes_taking_them():
    model = linear()
    weights = flat_weights(model)
    with torch.no_grad():
        model.weight.zero_()
    load_flat_weights(model, weights)
    assert torch.equal(flat_weights(model), weights)


def test_models_without_or_with_mixed_trained_parameters_are_refused():
    with pytest.raises(RequestError, match="nothing in the model requires a gradient"):
        trained_parameters(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(UnsupportedModelError, match="torch.float32, torch.float64; convert the model to one"):
        trained_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))


def test_frozen_statistics_normalise_by_the_batch_and_stay():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    expected = nn.BatchNorm1d(3)(x)
    with frozen_statistics(norm):
        assert torch.equal(norm(x), expected)
    assert norm.running_mean.abs().max() == 0 and norm.num_batches_tracked == 0 and norm.track_running_stats


# --- local training


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_ascent_gradient_is_autograds_at_the_ascent_point(mix):
    model, method = linear(), FedAvg()
    batch = Points().batch(range(20))

    def gradient_at(weight, bias):
        loss = F.cross_entropy(F.linear(batch["x"], weight, bias), batch["label"])
        return torch.cat([value.reshape(-1) for value in torch.autograd.grad(loss, (weight, bias))])

    weight, bias = (value.detach().clone().requires_grad_() for value in (model.weight, model.bias))
    g0 = gradient_at(weight, bias)
    e = 0.7 * g0 / (g0.norm() + 1e-7)
    moved = ((weight + e[:12].view(3, 4)).detach().requires_grad_(), (bias + e[12:]).detach().requires_grad_())
    expected = (1 - mix) * g0 + mix * gradient_at(*moved)
    with flattened(model) as flat:
        client = make_client(method, flat)
        before = flat.weights.clone()
        _, found = ascent_gradient(client, batch, 0.7, mix)
        assert torch.equal(flat.weights, before)
        torch.testing.assert_close(found, expected)
        assert client.gradients == (1 if mix == 0.0 else 2)


def test_a_zero_gradient_gives_no_ascent():
    model = linear()
    with flattened(model) as flat:
        client = make_client(FedAvg(), flat, loss=lambda m, b: (0.0 * m(b["x"]).sum(), None))
        _, found = ascent_gradient(client, Points().batch(range(5)), 0.1, 1.0)
    assert found.abs().max() == 0


def test_the_ascent_pass_leaves_running_statistics_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    once = copy.deepcopy(model)
    batch = Points().batch(range(20))
    once(batch["x"])
    with flattened(model) as flat:
        ascent_gradient(make_client(FedAvg(), flat), batch, 0.1, 1.0)
        assert torch.equal(model[0].running_mean, once[0].running_mean)


def test_one_client_with_everything_is_plain_sgd():
    method = FedAvg(AveragingConfig(n_clients=1, active_ratio=1.0, local_epochs=1, batch_size=60, **PLAIN))
    model, expected = linear(), linear()
    federate(method, model, 3)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(expected, Points().batch(range(60)))[0].backward()
        optimizer.step()
    torch.testing.assert_close(flat_weights(model), flat_weights(expected))


def test_clipping_decay_and_proximal_term_follow_the_stated_step():
    config = AveragingConfig(
        n_clients=1,
        active_ratio=1.0,
        local_epochs=3,
        batch_size=60,
        partition="iid",
        weight_decay=0.2,
        max_norm=0.05,
        mu=0.4,
    )
    model = linear()
    start = flat_weights(model)
    w = start.clone()
    for _ in range(3):
        reference = linear()
        load_flat_weights(reference, w)
        cross_entropy(reference, Points().batch(range(60)))[0].backward()
        g = torch.cat([p.grad.reshape(-1) for p in reference.parameters()]) - 0.4 * start
        g = g * min(1.0, 0.05 / (g.norm() + 1e-7))
        w = w - 0.1 * (g + (0.2 + 0.4) * w)
    federate(FedAvg(config), model, 1)
    torch.testing.assert_close(flat_weights(model), w)


def test_the_learning_rate_falls_per_round():
    method = FedAvg(AveragingConfig(lr=0.5, lr_decay=0.9))
    run = make_run(method)
    assert [local_rate(run, method.config, index) for index in (0, 1, 2)] == pytest.approx([0.5, 0.45, 0.405])


# --- baselines


MANY = {"n_clients": 5, "active_ratio": 0.5, "local_epochs": 2, "batch_size": 4, **PLAIN}


def test_the_servers_control_variate_is_the_mean_of_the_clients():
    method = Scaffold(FederatedConfig(**MANY))
    federate(method, linear(), 6)
    mean = sum(state["control"] for state in method.client_states.values()) / 5
    torch.testing.assert_close(method.server_state["control"], mean)


def test_scaffolds_first_round_is_that_of_fedavg_and_its_control_the_mean_gradient():
    model, other = linear(), linear()
    method = Scaffold(
        FederatedConfig(**{**MANY, "n_clients": 1, "active_ratio": 1.0, "local_epochs": 1, "batch_size": 60})
    )
    federate(method, model, 1)
    federate(FedAvg(AveragingConfig(**method.config.model_dump())), other, 1)
    assert torch.equal(flat_weights(model), flat_weights(other))
    reference = linear()
    cross_entropy(reference, Points().batch(range(60)))[0].backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in reference.parameters()])
    torch.testing.assert_close(method.client_states[0]["control"], gradient)


def test_feddyns_server_state_is_the_mean_of_the_clients():
    method = FedDyn(FedDynConfig(**MANY))
    federate(method, linear(), 6)
    mean = sum(state["g"] for state in method.client_states.values()) / 5
    torch.testing.assert_close(method.server_state["h"], mean)


def test_weights_can_be_averaged_by_samples():
    updates = [
        Update(i, samples, 1, 1, 0.0, {"weights": torch.tensor([value])})
        for i, (samples, value) in enumerate([(1, 0.0), (3, 4.0)])
    ]
    server = Server(0, torch.zeros(1), {}, 2)
    assert server.mean(updates).item() == 2.0
    assert server.mean(updates, by_samples=True).item() == 3.0


# --- rounds


def test_bytes_are_counted_per_client_both_ways_and_only_for_what_is_trained():
    model = linear(torch.float32)
    model.bias.requires_grad_(False)
    method = FedAvg(AveragingConfig(**{**MANY, "active_ratio": 1.0}))
    federate(method, model, 1, split=Points(dtype=torch.float32))
    assert method.history[0]["down"] == method.history[0]["up"] == 5 * 12 * 4
    assert method.history[0]["steps"] == method.history[0]["gradients"] == 5 * 2 * 3
    scaffold = Scaffold(FederatedConfig(**{**MANY, "active_ratio": 1.0}))
    federate(scaffold, model, 1, split=Points(dtype=torch.float32))
    assert scaffold.history[0]["down"] == scaffold.history[0]["up"] == 2 * 5 * 12 * 4
    assert bytes_of({"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(2)}) == 11


def test_a_client_that_diverges_drops_out_and_keeps_its_memory():
    class Breaks(Scaffold):
        @hookimpl
        def fl_client_update(self, client):
            update = super().fl_client_update(client)
            if client.round == 1 and client.index == 2:
                client.remember("control", torch.full_like(client.model.weights, 7.0))
                update.sent["weights"][0] = float("nan")
            return update

    method, model = Breaks(FederatedConfig(**{**MANY, "active_ratio": 1.0})), linear()
    run = federate(method, model, 1)
    before = method.client_states[2]["control"].clone()
    run.hook.train_step(
        step=Step(
            model=model,
            module=model,
            batch={},
            optimizer=None,
            run=run,
            index=1,
            epoch=1,
            loss=cross_entropy,
            backward=torch.Tensor.backward,
        )  # fmt: skip
    )
    assert method.history[1]["answered"] == 4 and flat_weights(model).isfinite().all()
    assert torch.equal(method.client_states[2]["control"], before)
    assert run.log.warnings == ["round 2: nothing usable from client 2"]


def test_rounds_without_any_answer_end_the_run():
    method = FedAvg(AveragingConfig(**MANY))
    with pytest.raises(RunError, match="three rounds in a row brought nothing usable.*smaller --lr"):
        federate(method, linear(), 5, loss=lambda m, b: (m(b["x"]).sum() * float("nan"), None))
    assert len(method.history) == 2


def test_clients_without_data_are_never_drawn():
    method = FedAvg(AveragingConfig(n_clients=30, active_ratio=1.0, dirichlet=1e-3, local_epochs=1))
    run = federate(method, linear(), 1)
    with_data = {index for index, part in enumerate(method.federation.parts) if len(part)}
    assert len(with_data) <= 3 and method.history[0]["drawn"] == len(with_data)
    assert "clients have no data and are never drawn" in run.log.warnings[0]


def test_batch_statistics_are_averaged_by_samples_and_counters_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 3)).double()
    method = FedAvg(
        AveragingConfig(**{**MANY, "active_ratio": 1.0, "batch_size": 60, "local_epochs": 1, "n_clients": 7})
    )
    run = federate(method, model, 1)
    torch.testing.assert_close(model[0].running_mean, Points().x.mean(0), atol=1e-6, rtol=1e-5)  # sent as float32
    assert model[0].num_batches_tracked == 0
    assert "group normalisation" in run.log.warnings[0]
    assert method.history[0]["up"] == 7 * (8 * (4 + 4 + 15) + 4 * 8)


def test_another_plugin_can_wrap_what_a_client_sends():
    class Halves:
        @hookimpl(wrapper=True)
        def fl_client_update(self, client):
            update = yield
            update.sent["weights"] = update.sent["weights"].to(torch.float16).to(update.sent["weights"])
            return update

    method, model = FedAvg(AveragingConfig(**MANY)), linear()
    plugins = Plugins([Chosen("fl_test", "", "", method)], extensions=[("fl_kit", FLKit())])
    plugins.manager.register(Halves())
    run = make_run(method)
    run.hook = plugins.hook
    step = Step(
        model=model, module=model, batch={}, optimizer=None, run=run, index=0, epoch=0, loss=cross_entropy,
        backward=torch.Tensor.backward,
    )  # fmt: skip
    plugins.hook.train_step(step=step)
    assert method.history[0]["answered"] > 0 and method.server_state == {}


@pytest.mark.parametrize(
    ("options", "precision", "message"),
    [
        (TrainOptions(optimizer="adam"), "fp32", "plain SGD steps without momentum; leave out --optimizer, and name"),
        (TrainOptions(momentum=0.9), "fp32", "plain SGD steps"),
        (TrainOptions(accumulate=2), "fp32", "do not accumulate gradients; leave out --accumulate"),
        (TrainOptions(), "fp16", "no loss scaling, which fp16 needs; use --precision bf16"),
    ],
)
def test_what_clients_do_not_do_is_refused_before_the_run(options, precision, message):
    method = FedAvg(AveragingConfig(**MANY))
    run = make_run(method, precision=precision)
    run.train = options.over(run.train)
    with pytest.raises(RequestError, match=message):
        check_request(method.config, run)


def test_training_in_bfloat16_runs_the_forward_pass_in_it():
    seen = []

    def loss(model, batch):
        output = model(batch["x"])
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), batch["label"]), output

    method = FedAvg(AveragingConfig(**MANY))
    model = linear(torch.float32)
    run = make_run(method, Points(dtype=torch.float32), precision="bf16")
    step = Step(
        model=model, module=model, batch={}, optimizer=None, run=run, index=0, epoch=0, loss=loss,
        backward=torch.Tensor.backward,
    )  # fmt: skip
    run.hook.train_step(step=step)
    assert set(seen) == {torch.bfloat16} and model.weight.dtype == torch.float32
