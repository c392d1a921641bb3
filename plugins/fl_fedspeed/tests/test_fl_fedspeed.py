import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from eff.cli import app
from eff.data import Data
from eff.run import Run, Step
from eff.schemas import CORE_TRAINING, DataSpec, Recipe, TaskSpec
from eff.session import Chosen, Plugins
from eff_fl_fedspeed.config import FedSpeedConfig
from eff_fl_fedspeed.plugin import FedSpeed
from eff_fl_kit.baselines import AveragingConfig, FedAvg, FedDyn, FedDynConfig
from eff_fl_kit.flat import flat_weights
from eff_fl_kit.plugin import FLKit
from eff_fl_kit.rounds import Federation

EFF_PLUGIN = "fl_fedspeed"
RUN = {"n_clients": 6, "active_ratio": 0.5, "local_epochs": 2, "batch_size": 5, "partition": "iid", "lr_decay": 1.0}
EXACT = {"weight_decay": 0.0, "max_norm": 0.0}


def test_contract(eff_contract_check):
    eff_contract_check()


class Numbered:
    """Random points, `per_client` with each label."""

    def __init__(self, per_client=10, clients=6):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(clients).repeat_interleave(per_client)
        self.x = torch.randn(len(self.labels), 4, generator=generator, dtype=torch.float64)

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, generator=None):
        chosen = torch.as_tensor(list(indices))
        return {"x": self.x[chosen], "label": self.labels[chosen]}

    def fingerprint(self):
        return "numbered"


def cross_entropy(model, batch):
    output = model(batch["x"])
    return F.cross_entropy(output, batch["label"] % 3), output


def linear():
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def federate(method, model, rounds, loss=cross_entropy, split=None, parts=None):
    plugins = Plugins([Chosen("fl_test", "", "", method)], extensions=[("fl_kit", FLKit())])
    data = Data(DataSpec(scheme="numbered"), TaskSpec(), train=split or Numbered())
    run = Run(None, torch.device("cpu"), 0, data, train=method.training().over(CORE_TRAINING), hook=plugins.hook)
    method.federation = Federation(method, run)
    if parts is not None:
        method.federation.backend.parts = parts
    for index in range(rounds):
        step = Step(
            model=model, module=model, batch={}, optimizer=None, run=run, index=index, epoch=index, loss=loss,
            backward=torch.Tensor.backward,
        )  # fmt: skip
        run.hook.train_step(step=step)
    return method


class PaperForm:
    """The paper's equations in float64, with the prox-correction g^ and without h, on recorded batches."""

    def __init__(self, model, lamb, rho, alpha, rule, n_clients):
        self.model, self.lamb, self.rho, self.alpha, self.rule = model, lamb, rho, alpha, rule
        self.g_hat = {index: torch.zeros_like(flat_weights(model)) for index in range(n_clients)}

    def gradient(self, x, batch):
        weight, bias = x[:12].view(3, 4).clone().requires_grad_(), x[12:].clone().requires_grad_()
        loss = F.cross_entropy(F.linear(batch["x"], weight, bias), batch["label"] % 3)
        return torch.cat([value.reshape(-1) for value in torch.autograd.grad(loss, (weight, bias))])

    def round(self, x_t, batches_of):
        sent = []
        for index, batches in batches_of.items():
            x = x_t.clone()
            for batch in batches:
                g1 = self.gradient(x, batch)
                g2 = self.gradient(x + self.rho * g1 / (g1.norm() + 1e-7), batch)
                mixed = (1 - self.alpha) * g1 + self.alpha * g2
                x = x - 0.1 * (mixed - self.g_hat[index] + self.lamb * (x - x_t))
            self.g_hat[index] = self.g_hat[index] - self.lamb * (x - x_t)
            sent.append(x - self.g_hat[index] / self.lamb if self.rule == "paper" else x)
        mean = sum(sent) / len(sent)
        if self.rule == "code":  # h_i = -g^_i / lamb, over all clients
            mean = mean - sum(self.g_hat.values()) / (self.lamb * len(self.g_hat))
        return mean


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize(("lamb", "rho", "alpha"), [(0.1, 0.1, 1.0), (0.7, 0.3, 0.4), (0.2, 0.0, 1.0)])
def test_rounds_are_those_of_the_papers_equations(rule, lamb, rho, alpha):
    config = FedSpeedConfig(**RUN, **EXACT, lamb=lamb, rho=rho, alpha=alpha, server_rule=rule)
    method, model = FedSpeed(config), linear()
    split = Numbered()
    original = split.batch
    paper = PaperForm(linear(), lamb, rho, alpha, rule, 6)
    x = flat_weights(model)
    for index in range(4):
        calls = []
        split.batch = lambda indices, generator=None, calls=calls: calls.append(list(indices)) or original(indices)
        if index == 0:
            federate(method, model, 1, split=split)
        else:
            _one_more(method, model, split, index)
        owner = {int(sample): client for client, part in enumerate(method.federation.parts) for sample in part}
        seen = {}
        for indices in calls:
            seen.setdefault(owner[indices[0]], []).append(original(indices))
        x = paper.round(x, seen)
        torch.testing.assert_close(flat_weights(model), x, rtol=1e-9, atol=1e-11)
    for client, state in method.client_states.items():
        torch.testing.assert_close(state["h"], -paper.g_hat[client] / lamb, rtol=1e-9, atol=1e-11)


def _one_more(method, model, split, index):
    plugins = Plugins([Chosen("fl_test", "", "", method)], extensions=[("fl_kit", FLKit())])
    data = Data(DataSpec(scheme="numbered"), TaskSpec(), train=split)
    run = Run(None, torch.device("cpu"), 0, data, train=method.training().over(CORE_TRAINING), hook=plugins.hook)
    step = Step(
        model=model, module=model, batch={}, optimizer=None, run=run, index=index, epoch=index, loss=cross_entropy,
        backward=torch.Tensor.backward,
    )  # fmt: skip
    plugins.hook.train_step(step=step)


def test_the_servers_mean_offset_is_that_of_all_clients():
    method = federate(FedSpeed(FedSpeedConfig(**RUN)), linear(), 5)
    mean = sum(state["h"] for state in method.client_states.values()) / 6
    torch.testing.assert_close(method.server_state["mean_h"], mean)


def test_with_all_clients_every_round_both_server_rules_agree():
    options = {**RUN, "active_ratio": 1.0}
    other, model = linear(), linear()
    federate(FedSpeed(FedSpeedConfig(**options, server_rule="code")), other, 3)
    federate(FedSpeed(FedSpeedConfig(**options, server_rule="paper")), model, 3)
    torch.testing.assert_close(flat_weights(model), flat_weights(other))


def test_without_ascent_it_is_feddyn():
    model, other = linear(), linear()
    federate(FedSpeed(FedSpeedConfig(**RUN, lamb=0.3, rho=0.0)), model, 5)
    federate(FedDyn(FedDynConfig(**RUN, alpha=0.3)), other, 5)
    torch.testing.assert_close(flat_weights(model), flat_weights(other))


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_as_lamb_vanishes_the_first_clients_are_those_of_fedavg_or_fedsam(rho):
    sent = {}

    def catch(cls):
        class Catching(cls):
            def fl_client_update(self, client):
                update = super().fl_client_update(client)
                sent.setdefault(cls, {})[client.index] = update.sent["weights"]
                return update

        Catching.fl_client_update.eff_impl = cls.fl_client_update.eff_impl
        return Catching

    federate(catch(FedSpeed)(FedSpeedConfig(**RUN, lamb=1e-12, rho=rho)), linear(), 1)
    federate(catch(FedAvg)(AveragingConfig(**RUN, rho=rho)), linear(), 1)
    for index, weights in sent[FedAvg].items():
        torch.testing.assert_close(sent[FedSpeed][index], weights, rtol=0, atol=1e-10)


def test_on_unlike_quadratics_it_finds_the_global_minimum_and_fedavg_and_fedprox_do_not():
    """f_i(x) = (1/2) sum d_i (x - a_i)^2: the minimum of the sum is the d-weighted mean of the a_i."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    d = 0.2 + 3 * torch.rand(6, 5, generator=generator, dtype=torch.float64)
    optimum = (a * d).sum(0) / d.sum(0)

    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def quadratic(model, batch):
        index = int(batch["label"][0])
        return 0.5 * (d[index] * (model.x - a[index]).square()).sum(), None

    split = Numbered(per_client=1)
    parts = [torch.tensor([index]) for index in range(6)]
    options = {**RUN, **EXACT, "active_ratio": 1.0, "local_epochs": 10, "batch_size": 1}

    def distance(method):
        model = Vector()
        federate(method, model, 20, loss=quadratic, split=split, parts=parts)
        return (model.x - optimum).norm().item()

    assert distance(FedSpeed(FedSpeedConfig(**options, lamb=1.0, rho=0.0))) < 1e-3
    assert distance(FedAvg(AveragingConfig(**options))) > 0.1
    assert distance(FedAvg(AveragingConfig(**options, mu=1.0))) > 0.1


def test_a_relaxed_start_lies_ahead_of_the_last_model_and_the_offset_counts_from_there():
    starts = {}

    class Watching(FedSpeed):
        def fl_client_update(self, client):
            last = client.state.get("last")
            expected = client.received["weights"] + (0 if last is None else 0.1 * (client.received["weights"] - last))
            before = client.remembered("h")
            update = super().fl_client_update(client)
            starts[client.round] = (update, expected, before, client.state)
            return update

    Watching.fl_client_update.eff_impl = FedSpeed.fl_client_update.eff_impl
    options = {**RUN, "n_clients": 1, "active_ratio": 1.0, "relaxed_init": True}
    method = federate(Watching(FedSpeedConfig(**options)), linear(), 2)
    update, start, before, state = starts[1]
    torch.testing.assert_close(update.sent["offset"], update.sent["weights"] - start)
    torch.testing.assert_close(state["h"], before + update.sent["offset"])
    torch.testing.assert_close(method.server_state["mean_h"], state["h"])


def test_traffic_is_that_of_fedavg():
    speed = federate(FedSpeed(FedSpeedConfig(**RUN)), linear(), 2)
    average = federate(FedAvg(AveragingConfig(**RUN)), linear(), 2)
    assert [(row["up"], row["down"]) for row in speed.history] == [(row["up"], row["down"]) for row in average.history]
    assert speed.history[0]["gradients"] == 2 * speed.history[0]["steps"] == 2 * average.history[0]["gradients"]


def test_only_parameters_that_require_a_gradient_change_and_travel():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    method = federate(FedSpeed(FedSpeedConfig(**{**RUN, "active_ratio": 1.0})), model, 2)
    assert torch.equal(model[0].weight, before[0].weight) and not torch.equal(model[2].weight, before[2].weight)
    assert method.history[0]["up"] == 6 * (8 * 3 + 3) * 8
    assert method.client_states[0]["h"].shape == (27,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lamb=0"], "lamb must be above 0"),
        (["rho=-1"], "rho must be at least 0"),
        (["alpha=1.5"], "alpha must be at most 1"),
        (["active_ratio=0"], "active_ratio must be above 0"),
        (["server_rule=both"], "server_rule"),
        (["n_clients=5000"], "cannot be divided into 5000 clients"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_written(options, message, tmp_path):
    out = tmp_path / "out"
    arguments = [part for option in options for part in ("-o", option)]
    from eff.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["apply", "fl_fedspeed", "eff.testing.samples:tiny_cnn", "--data", "eff.testing.samples:blobs", "--out", str(out), *arguments])  # fmt: skip
    assert stopped.value.code == 2 and not out.exists()


def test_a_run_reports_its_rounds_and_keeps_the_offsets_where_asked(tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    arguments = ["apply", "fl_fedspeed", "eff.testing.samples:tiny_cnn", "--data", "eff.testing.samples:blobs"]
    options = ["rounds=2", "n_clients=4", "active_ratio=1", "batch_size=16", "keep_clients=true", "eval_every=1"]
    for option in options:
        arguments += ["-o", option]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    rows = report["after"]["metrics"]["tables"]["rounds"]
    assert [row["round"] for row in rows] == [1, 2] and all("accuracy" in row for row in rows)
    assert rows[0]["up"] == rows[0]["down"] == 4 * (1292 + 16) * 4  # parameters, and BatchNorm's means and variances
    assert set(load_file(out / "clients.safetensors")) == {"h.0", "h.1", "h.2", "h.3"}
    assert Recipe.model_validate(report["recipe"]).methods[0].name == "fl_fedspeed"


@pytest.mark.claim
@pytest.mark.slow
def test_the_claim_holds():
    from eff.claims import verify

    (result,) = verify("fl_fedspeed")
    assert result.holds, result.checks
