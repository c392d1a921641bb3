"""AdamP and SGDP against a float64 loop written from the paper's equations, against torch, compiled, resumed."""

import copy
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from eff_kernels.adamp_step import cpu
from eff_kernels.adamp_step.projection import detect, remove_radial_
from eff_train_adamp.optimizers import SGDP, AdamP, GradientError

no_compiler = shutil.which("g++") is None and shutil.which("clang++") is None
SHAPES = ((4, 3, 3, 3), (4,), (5, 36), (5,), (7, 2))


def loop_project(weight, gradient, update, delta, eps):
    """Return the projected update, whether it was projected: the card's procedure, row by row."""
    for rows in (weight.shape[0], 1):
        w, g, u = (tensor.reshape(rows, -1) for tensor in (weight, gradient, update))
        cosines = []
        for i in range(rows):
            norms = max(float(w[i].norm()), eps) * max(float(g[i].norm()), eps)
            cosines.append(abs(float(w[i] @ g[i])) / norms)
        if max(cosines) < delta / math.sqrt(w.shape[1]):
            found = u.clone()
            for i in range(rows):
                n = w[i] / (w[i].norm() + eps)
                found[i] = u[i] - n * (n @ u[i])
            return found.reshape(update.shape), True
    return update, False


class Loop:
    """Both optimizers in float64, one tensor after another."""

    def __init__(self, params, kind, **options):
        self.params = [parameter.detach().double().clone() for parameter in params]
        self.kind, self.options, self.t = kind, options, 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.projected = 0

    def step(self, gradients):
        o, self.t = self.options, self.t + 1
        for i, g in enumerate(gradients):
            p, g = self.params[i], g.double()
            if self.kind == "adamp":
                b1, b2 = o["betas"]
                self.m[i] = b1 * self.m[i] + (1 - b1) * g
                self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
                denominator = self.v[i].sqrt() / math.sqrt(1 - b2**self.t) + o["eps"]
                u = (b1 * self.m[i] + (1 - b1) * g if o["nesterov"] else self.m[i]) / denominator
                rate, decay = o["lr"] / (1 - b1**self.t), o["lr"] * o["weight_decay"]
            else:
                self.m[i] = o["momentum"] * self.m[i] + (1 - o["dampening"]) * g
                u = g + o["momentum"] * self.m[i] if o["nesterov"] else self.m[i]
                rate, decay = o["lr"], o["lr"] * o["weight_decay"] / (1 - o["momentum"])
            ratio = 1.0
            if p.ndim > 1:
                u, was = loop_project(p, g, u, o["delta"], o["eps"])
                ratio = o["wd_ratio"] if was else 1.0
                self.projected += was
                if self.kind == "sgdp" and not o["nesterov"]:
                    self.m[i] = u  # the update is the buffer
            self.params[i] = p * (1 - decay * ratio) - rate * u


def gradients_for(params, generator, radial):
    """Return random gradients; those of the first and third tensor are orthogonal per row, or as a whole."""
    found = []
    for number, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.ndim > 1 and number != 4:
            rows = p.shape[0] if number == 0 else 1
            w, flat = p.detach().reshape(rows, -1), g.reshape(rows, -1)
            share = (w * flat).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
            g = (flat - (1 - radial) * share * w).reshape(p.shape)
        found.append(g)
    return found


CASES = [
    ("adamp", AdamP, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "nesterov": nesterov})
    for nesterov in (False, True)
] + [
    ("sgdp", SGDP, {"lr": 0.05, "momentum": 0.9, "dampening": dampening, "weight_decay": 0.01, "nesterov": nesterov})
    for nesterov in (False, True)
    for dampening in (0.0, 0.3)
]


@pytest.mark.parametrize(("kind", "make", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_equal_the_float64_loop(kind, make, options, dtype):
    generator = torch.Generator().manual_seed(0)
    shared = {"eps": 1e-8, "delta": 0.1, "wd_ratio": 0.1}
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
    loop = Loop(params, kind, **options, **shared)
    optimizer = make(params, **options, **shared)
    for index in range(8):
        gradients = gradients_for(params, generator, radial=0.0 if index % 4 else 1.0)
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        loop.step(gradients)
        tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
        for parameter, expected in zip(params, loop.params, strict=True):
            torch.testing.assert_close(parameter.detach().double(), expected, **tolerance)
    assert 8 <= loop.projected < 24  # both branches were taken


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 12),
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-3, 1e3),
    radial=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_the_projection_is_orthogonal_per_row_and_blind_to_the_scale_of_the_weight(rows, columns, seed, scale, radial):
    generator = torch.Generator().manual_seed(seed)
    w, g, u = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(3))
    g = g - (1 - radial) * w * ((w * g).sum(1, keepdim=True) / w.square().sum(1, keepdim=True))
    found = detect([w], [g], 0.1, 1e-30)
    projected = u.clone()
    remove_radial_([projected], [w], found, 1e-30)
    expected, was = loop_project(w, g, u, 0.1, 1e-30)
    assert bool(found.channel[0] | found.layer[0]) is was
    torch.testing.assert_close(projected, expected, rtol=1e-9, atol=1e-9)
    if found.channel[0]:
        assert ((projected * w).sum(1).abs() <= 1e-9 * w.norm(dim=1) * u.norm(dim=1)).all()
    again = u.clone()
    scaled = detect([scale * w], [g], 0.1, 1e-30)
    remove_radial_([again], [scale * w], scaled, 1e-30)
    torch.testing.assert_close(again, projected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 16), (2, 4, 5, 5)])
@pytest.mark.parametrize(("share", "expected"), [(0.99, True), (1.01, False)])
def test_the_threshold_is_delta_over_the_root_of_the_row_length(shape, share, expected):
    """Row 0 has a cosine of `share` times the threshold, the others 0; the largest decides, not the mean."""
    generator = torch.Generator().manual_seed(6)
    w, g = (torch.randn(shape[0], math.prod(shape[1:]), generator=generator, dtype=torch.float64) for _ in range(2))
    g -= w * (w * g).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    cosine = share * 0.1 / math.sqrt(w.shape[1])
    across, along = g[0] / g[0].norm(), w[0] / w[0].norm()
    g[0] = cosine * along + math.sqrt(1 - cosine**2) * across
    found = detect([w.reshape(shape)], [g.reshape(shape)], 0.1, 1e-8)
    assert found.channel.item() is expected
    whole = detect([w[:1].reshape(1, *shape[1:])], [g[:1].reshape(1, *shape[1:])], 0.1, 1e-8)
    assert (whole.channel | whole.layer).item() is expected  # one row: both views are the same


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from([(2, 6), (5, 3, 2), (4, 2, 3, 3)]), seed=st.integers(0, 2**16), lean=st.floats(0.3, 3.0))
def test_a_gradient_that_is_orthogonal_only_as_a_whole_is_projected_as_a_whole(shape, seed, lean):
    """The first row leans to its weight, the last one leans back: no row by itself is scale invariant."""
    generator = torch.Generator().manual_seed(seed)
    w, u = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = w.reshape(shape[0], -1)
    g = torch.zeros_like(rows)
    g[0], g[-1] = lean * rows[0] / rows[0].square().sum(), -lean * rows[-1] / rows[-1].square().sum()
    found = detect([w], [g.reshape(shape)], 0.1, 1e-30)
    assert (found.channel.item(), found.layer.item()) == (False, True)
    projected = u.clone()
    remove_radial_([projected], [w], found, 1e-30)
    assert abs(float((projected * w).sum())) <= 1e-12 * float(u.norm() * w.norm())
    torch.testing.assert_close(projected, u - w * (u * w).sum() / w.square().sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "make", "options"), CASES)
def test_all_tensors_together_step_as_each_by_itself(kind, make, options, monkeypatch):
    """Also where the CPU takes them in portions: what stands beside a tensor never matters."""
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    together, single, portions = ([nn.Parameter(value.clone()) for value in start] for _ in range(3))
    of_single = [make([parameter], **options) for parameter in single]
    of_together, of_portions = make(together, **options), make(portions, **options)
    for index in range(6):
        gradients = gradients_for(together, generator, radial=float(index % 2))
        for params in (together, single, portions):
            for parameter, gradient in zip(params, gradients, strict=True):
                parameter.grad = gradient.clone()
        of_together.step()
        for optimizer in of_single:
            optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "PORTION", 50)
            of_portions.step()
    for a, b, c in zip(together, single, portions, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(("kind", "make", "options"), CASES)
def test_steps_equal_those_of_the_published_package(kind, make, options):
    reference = pytest.importorskip("adamp", reason="comparing with the reference code needs the package adamp")
    generator = torch.Generator().manual_seed(4)
    ours = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    steps = make(ours, **options), getattr(reference, make.__name__)(theirs, **options)
    for index in range(20):
        for a, b, gradient in zip(ours, theirs, gradients_for(ours, generator, float(index % 2)), strict=True):
            a.grad, b.grad = gradient, gradient.clone()
        for optimizer in steps:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def train(optimizer_of, steps=6, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    optimizer = optimizer_of(model.parameters())
    x, y = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer, (x, y)


def close(left, right, **tolerance):
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_where_nothing_is_projected_they_are_torchs_adamw_and_sgd():
    """A threshold of practically zero never passes; AdamW's decay is adamp's, momentum starts as SGD's."""
    ours, _, _ = train(lambda p: AdamP(p, lr=0.01, weight_decay=0.1, delta=1e-30))
    theirs, _, _ = train(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours, _, _ = train(lambda p: SGDP(p, lr=0.05, momentum=0.9, delta=1e-30))
    theirs, _, _ = train(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "torchs", "options"),
    [
        (AdamP, torch.optim.Adam, {"lr": 0.01}),
        (AdamP, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
        (SGDP, torch.optim.SGD, {"lr": 0.05}),
        (SGDP, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ],
)
def test_weights_of_one_dimension_step_as_in_torch(make, torchs, options):
    generator = torch.Generator().manual_seed(5)
    weights = [nn.Parameter(torch.ones(7, dtype=torch.float64)) for _ in range(2)]
    ours, theirs = make(weights[:1], **options), torchs(weights[1:], **options)
    for _ in range(20):
        weights[0].grad = torch.randn(7, generator=generator, dtype=torch.float64)
        weights[1].grad = weights[0].grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-13)


def test_a_weight_before_batch_norm_is_projected_and_stays_shorter():
    plain, _, _ = train(lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), steps=30)
    projected, _, _ = train(lambda p: SGDP(p, lr=0.2, momentum=0.9), steps=30)
    assert projected[0].weight.norm() < plain[0].weight.norm()


@pytest.mark.parametrize("make", [lambda p: AdamP(p, weight_decay=0.01), lambda p: SGDP(p, lr=0.05, momentum=0.9)])
def test_a_restored_optimizer_goes_on_bit_for_bit(make):
    model, optimizer, (x, y) = train(make)
    other = copy.deepcopy(model)
    restored = make(other.parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, steps in ((model, optimizer), (other, restored)):
        for _ in range(3):
            steps.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [AdamP, lambda p, lr: SGDP(p, lr=lr, momentum=0.9, weight_decay=1e-3)])
def test_a_compiled_step_equals_the_plain_one_and_compiles_once(make):
    """The graph is what torch.compile captures; without its C++ backend, which needs a compiler."""
    torch._dynamo.reset()
    counter = CompileCounter()
    models = [train(lambda p: torch.optim.SGD(p, lr=0.0), steps=1)[0] for _ in range(2)]
    optimizers = [make(model.parameters(), lr=torch.tensor(0.01)) for model in models]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend=counter, fullgraph=False)]
    generator = torch.Generator().manual_seed(1)
    for index in range(5):
        for optimizer in optimizers:  # a schedule changes the rate
            optimizer.param_groups[0]["lr"].fill_(0.01 / (index + 1))
        gradients = [torch.randn(p.shape, generator=generator) for p in models[0].parameters()]
        for model, step in zip(models, steps, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            step()
    close(*models, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 3, "the step is compiled anew every time"


@pytest.mark.parametrize("make", [AdamP, lambda p, lr, **decay: SGDP(p, lr=lr, momentum=0.9, **decay)])
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(no_compiler, reason="no C++ compiler")]),
    ],
)
def test_a_compiled_step_follows_a_rate_that_is_a_number(make, backend):
    """Inductor of torch 2.13 decayed weights of one dimension with a stale rate where the graph held the number."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    plain, compiled = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    both = [make(params, lr=0.01, weight_decay=0.1) for params in (plain, compiled)]
    steps = [both[0].step, torch.compile(both[1].step, backend=backend)]
    for index in range(6):
        for left, right in zip(plain, compiled, strict=True):
            left.grad = torch.randn(left.shape, generator=generator)
            right.grad = left.grad.clone()
        for optimizer, step in zip(both, steps, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 / (index + 1)
            step()
    for left, right in zip(plain, compiled, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3, "the step is compiled anew for every rate"


def test_a_model_that_is_compiled_trains_the_same():
    torch._dynamo.reset()
    plain, _, (x, y) = train(lambda p: AdamP(p, lr=0.01), steps=4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    optimizer, compiled = AdamP(model.parameters(), lr=0.01), torch.compile(model, backend="aot_eager")
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
    close(plain, model, rtol=1e-4, atol=1e-5)


def test_channels_last_weights_step_as_contiguous_ones():
    weight, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weight.clone(memory_format=form))
        parameter.grad = gradient.clone(memory_format=form)
        optimizer = AdamP([parameter], delta=100.0)
        optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """The product of weight and momentum, 4096 times 64, is infinite in float16; projected, only the gradient stays."""
    weight = nn.Parameter(torch.full((2, 4096), 8.0, dtype=dtype))
    weight.grad = torch.full((2, 4096), 8.0, dtype=dtype)
    weight.grad[:, ::2] *= -1  # orthogonal
    optimizer = SGDP([weight], lr=0.5, momentum=0.5)
    optimizer.state[weight]["momentum"] = torch.full_like(weight, 8.0)
    optimizer.step()
    expected = 8.0 - 0.5 * weight.grad.float()
    torch.testing.assert_close(weight.detach().float(), expected, rtol=1e-2, atol=1e-2)
    assert weight.dtype == dtype


@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_a_weight_of_zeros_stays_finite(make):
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.ones(3, 4)
    optimizer = make([weight], lr=0.1, weight_decay=0.1)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), -0.1))


def test_a_closure_runs_with_gradients():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamP([weight])

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert (weight < 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_changed(value):
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 2))
    first.grad, second.grad = torch.ones(2, 2), torch.full((3, 2), value)
    optimizer = AdamP([("first", first), ("body.weight", second)])
    with pytest.raises(GradientError, match="the gradient of 'body.weight' holds NaN or infinity; try a smaller --lr"):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(2, 2)) and not optimizer.state


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(GradientError, match=r"is sparse; make the layer with sparse=False"):
        SGDP(layer.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (AdamP, {"lr": -1.0}, "lr must be at least 0, got -1.0"),
        (AdamP, {"betas": (0.9, 1.0)}, r"betas must be two values in \[0, 1\), got \(0.9, 1.0\)"),
        (AdamP, {"eps": 0.0}, "eps must be above 0, got 0.0"),
        (AdamP, {"delta": 0.0}, "delta must be above 0, got 0.0"),
        (AdamP, {"wd_ratio": 1.5}, r"wd_ratio must be in \[0, 1\], got 1.5"),
        (AdamP, {"weight_decay": math.nan}, "weight_decay must be at least 0, got nan"),
        (SGDP, {"lr": 0.1, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (SGDP, {"lr": 0.1, "dampening": 1.1}, r"dampening must be in \[0, 1\], got 1.1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))], **options)


def test_the_reference_codes_step_counts_are_read():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamP([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = 1
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
