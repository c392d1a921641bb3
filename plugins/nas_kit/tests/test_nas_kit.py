"""Search spaces, mixing, samplers and supernets against explicit sums, slices and scipy."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.errors import ConfigError, DataError, ModelError, UnsupportedModelError
from eff.testing.samples import BlobSplit, TinyCNN
from eff_nas_kit.layers import EntangledBatchNorm, EntangledConv2d, EntangledLayerNorm, EntangledLinear, Selection
from eff_nas_kit.macro import DigitsMacroOptions, MacroNet, MacroOptions
from eff_nas_kit.mixing import axis_table, kernel_table, mix, mix_by_sum
from eff_nas_kit.quality import kendall_tau, linear_cka, saved_bytes
from eff_nas_kit.samplers import (
    Architecture,
    dirichlet_sample,
    gumbel_one_hot,
    linear_tau,
    random_network,
    sparsemax,
)
from eff_nas_kit.space import Axis, Choice, Genotype, LayerChoices, SearchSpace, read_genotype
from eff_nas_kit.splitting import split_for_search
from eff_nas_kit.supernet import discretise, expected_share, make_supernet, recalibrate, subnet
from eff_nas_kit.tracing import SpaceOptions, find_space


def loop_mix(weight, widths_out, widths_in, kernels, a_out, a_in, a_k):
    """Return sum_j a_j Pad(S_j(W)) in float64, candidate by candidate, with slices: what the paper's code does."""
    mixed = torch.zeros_like(weight, dtype=torch.float64)
    k_max = weight.shape[-1]
    for (i, o), (j, c), (m, k) in itertools.product(enumerate(widths_out), enumerate(widths_in), enumerate(kernels)):
        start = (k_max - k) // 2
        part = weight[:o, :c, start : start + k, start : start + k].double()
        mixed[:o, :c, start : start + k, start : start + k] += float(a_out[i] * a_in[j] * a_k[m]) * part
    return mixed


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 6), inp=st.integers(1, 5), kernel=st.sampled_from([1, 3, 5, 7]), seed=st.integers(0, 2**16))
def test_closed_form_mixing_is_the_sum_over_all_candidates(out, inp, kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    widths_out, widths_in = tuple(range(1, out + 1)), tuple(range(1, inp + 1))
    kernels = tuple(range(1, kernel + 1, 2))
    weight = torch.randn(out, inp, kernel, kernel, generator=generator, dtype=torch.float64)
    a_out, a_in, a_k = draw(out), draw(inp), draw(len(kernels))
    tables = [
        axis_table(Axis(choice="o"), widths_out, out).double(),
        axis_table(Axis(choice="i"), widths_in, inp).double(),
        kernel_table(kernels, kernel).double(),
    ]
    masks = [table @ a for table, a in zip(tables, (a_out, a_in, a_k), strict=True)]
    expected = loop_mix(weight, widths_out, widths_in, kernels, a_out, a_in, a_k)
    torch.testing.assert_close(mix(weight, *masks), expected, rtol=1e-12, atol=1e-12)
    by_sum = mix_by_sum(weight, list(zip(tables, (a_out, a_in, a_k), strict=True)))
    torch.testing.assert_close(by_sum, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_closed_form_pass_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 3, 3), (3,), (2,), (9,))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(mix, inputs)


WIDTHS, KERNELS = (2, 4, 8), (1, 3, 5)


def conv(mixing="entangled", crop="center", groups=1, **options):
    space = SearchSpace(
        choices={
            "o": Choice(kind="width", values=WIDTHS),
            "i": Choice(kind="width", values=WIDTHS),
            "k": Choice(kind="kernel", values=KERNELS),
        },
        layers={},
        crop=crop,
    )
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 5, padding=2, groups=groups, **options)
    axes = LayerChoices(out=Axis(choice="o"), inp=None if groups > 1 else Axis(choice="i"), kernel="k")
    return EntangledConv2d(layer, axes, Selection(space, mixing))


def coefficients(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(3, generator=generator).softmax(0) for name in ("o", "i", "k")}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}, {"groups": 8}])
def test_mixed_weights_compute_the_mixture_of_outputs(options):
    entangled, output = conv(**options), conv("output", **options)
    x = torch.randn(3, 8, 9, 9)
    for layer in (entangled, output):
        layer.selection.use(coefficients(), False)
    torch.testing.assert_close(entangled(x), output(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", list(itertools.product(range(3), repeat=3))[::4])
def test_one_hot_coefficients_are_the_slice_in_all_three_modes(chosen):
    """Padding is half the largest kernel in one mode and half the chosen one in the other."""
    one_hot = {name: torch.eye(3)[index] for name, index in zip("oik", chosen, strict=True)}
    o, i, k = WIDTHS[chosen[0]], WIDTHS[chosen[1]], KERNELS[chosen[2]]
    x = torch.randn(2, 8, 7, 7)
    layer = conv()
    start = (5 - k) // 2
    weight = layer.layer.weight[:o, :i, start : start + k, start : start + k]
    expected = nn.functional.conv2d(x[:, :i], weight, layer.layer.bias[:o], padding=k // 2)
    for mixing in ("entangled", "output"):
        layer = conv(mixing)
        layer.selection.use(one_hot, False)
        y = layer(x)
        torch.testing.assert_close(y[:, :o], expected, rtol=1e-5, atol=1e-5)
        assert y[:, o:].abs().max() == 0 if o < 8 else True
    layer.selection.use(one_hot, True)
    torch.testing.assert_close(layer(x[:, :i]), expected, rtol=1e-5, atol=1e-5)


def test_a_single_path_passes_the_straight_through_gradient():
    layer = conv()
    alphas = {name: torch.zeros(3, requires_grad=True) for name in "oik"}
    torch.manual_seed(0)
    layer.selection.use({name: gumbel_one_hot(alpha, 1.0) for name, alpha in alphas.items()}, True)
    layer(torch.randn(1, WIDTHS[WIDTHS.index(layer.selection.chosen["i"])], 5, 5)).square().sum().backward()
    assert all(alpha.grad.abs().sum() > 0 for alpha in alphas.values())


def test_linear_and_norms_mix_as_their_slices_do():
    space = SearchSpace(
        choices={"o": Choice(kind="width", values=WIDTHS), "i": Choice(kind="width", values=WIDTHS)}, layers={}
    )
    torch.manual_seed(0)
    linear = nn.Linear(24, 8)
    axes = LayerChoices(out=Axis(choice="o"), inp=Axis(choice="i", repeat=3))
    x, given = torch.randn(4, 24), {name: coefficients()[name] for name in "oi"}
    layers = [EntangledLinear(linear, axes, Selection(space, mixing)) for mixing in ("entangled", "output")]
    for layer in layers:
        layer.selection.use(given, False)
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-5, atol=1e-5)
    one_hot = {"o": torch.eye(3)[1], "i": torch.eye(3)[2]}
    for norm, kind, x in (
        (nn.LayerNorm(8), EntangledLayerNorm, torch.randn(5, 8)),
        (nn.BatchNorm2d(8), EntangledBatchNorm, torch.randn(5, 8, 3, 3)),
    ):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        layer = kind(norm, LayerChoices(out=Axis(choice="o")), Selection(space))
        layer.selection.use(one_hot, False)
        y = layer(x)
        if kind is EntangledLayerNorm:
            expected = nn.functional.layer_norm(x[:, :4], (4,), norm.weight[:4], norm.bias[:4])
        else:
            expected = nn.functional.batch_norm(x[:, :4], None, None, norm.weight[:4], norm.bias[:4], True)
        torch.testing.assert_close(y[:, :4], expected, rtol=1e-4, atol=1e-5)
        assert y[:, 4:].abs().max() == 0


@pytest.mark.parametrize("mixing", ["entangled", "output"])
def test_kept_memory_grows_with_the_candidates_of_mixed_outputs_only(mixing):
    """Bytes that autograd keeps for the backward pass: shapes decide, not the machine."""
    kept = []
    for names in ("k", "ok", "oik"):
        layer = conv(mixing)
        layer.axes = LayerChoices(
            out=Axis(choice="o") if "o" in names else None, inp=Axis(choice="i") if "i" in names else None, kernel="k"
        )
        x = torch.randn(8, 8, 16, 16, requires_grad=True)
        alphas = {name: torch.zeros(3, requires_grad=True) for name in "oik"}
        layer.selection.use({name: alpha.softmax(0) for name, alpha in alphas.items()}, False)
        kept.append(saved_bytes(lambda layer=layer, x=x: layer(x)))
    if mixing == "entangled":
        assert max(kept) <= 1.05 * min(kept)
    else:
        assert kept[2] > 3 * kept[0]


# --- samplers


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_sparsemax_is_the_projection_onto_the_simplex(values):
    """Its conditions: on the simplex, and alpha - p is constant where p > 0 and no larger elsewhere."""
    alpha = torch.tensor(values, dtype=torch.float64)
    p = sparsemax(alpha)
    assert p.min() >= 0 and float(p.sum()) == pytest.approx(1.0)
    difference = alpha - p
    level = difference[p > 0]
    assert (level - level[0]).abs().max() < 1e-9
    assert (difference[p == 0] <= level[0] + 1e-9).all()


def test_dirichlet_samples_have_its_mean_and_stay_finite_where_concentration_vanishes():
    torch.manual_seed(0)
    alpha = torch.tensor([0.5, -0.5, 1.0])
    concentration = nn.functional.elu(alpha) + 1
    mean = torch.stack([dirichlet_sample(alpha) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, concentration / concentration.sum(), rtol=0, atol=0.02)
    extreme = torch.full((3,), -100.0, requires_grad=True)
    sample = dirichlet_sample(extreme)
    assert torch.isfinite(sample).all()


def test_gumbel_draws_follow_the_softmax_and_are_one_hot():
    torch.manual_seed(0)
    alpha = torch.tensor([1.0, 0.0, -1.0])
    draws = torch.stack([gumbel_one_hot(alpha, 0.7) for _ in range(4000)])
    assert ((draws - draws.round()).abs() < 1e-6).all()
    torch.testing.assert_close(draws.mean(0), alpha.softmax(0), rtol=0, atol=0.03)


def test_the_temperature_falls_linearly():
    assert [linear_tau(10.0, 0.1, epoch, 3) for epoch in range(3)] == pytest.approx([10.0, 5.05, 0.1])
    assert linear_tau(10.0, 0.1, 0, 1) == 10.0


@pytest.mark.parametrize("sampler", ["darts", "drnas", "gdas", "spos"])
def test_each_vector_is_drawn_once_and_means_what_it_says(sampler):
    space = SearchSpace(choices={"w": Choice(kind="width", values=WIDTHS)}, layers={})
    architecture = Architecture(space, sampler, "entangled", torch.Generator().manual_seed(0))
    assert float(architecture.sample()["w"].detach().sum()) == pytest.approx(1.0)
    assert architecture.entropy() == pytest.approx(1.0, abs=1e-3)  # alphas start near 0
    with torch.no_grad():
        architecture.alphas["w"].copy_(torch.tensor([0.0, 5.0, 0.0]))
    assert architecture.argmax() == {"w": 4}
    assert architecture.single_path == (sampler in ("gdas", "spos")) and architecture.learns == (sampler != "spos")


def test_the_divergence_to_the_uniform_dirichlet_is_zero_at_zero_only():
    space = SearchSpace(choices={"w": Choice(kind="width", values=WIDTHS)}, layers={})
    architecture = Architecture(space, "drnas", "entangled", torch.Generator().manual_seed(0))
    with torch.no_grad():
        architecture.alphas["w"].zero_()
    assert float(architecture.dirichlet_divergence().detach()) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        architecture.alphas["w"].copy_(torch.tensor([1.0, -1.0, 0.0]))
    assert float(architecture.dirichlet_divergence().detach()) > 0.1


# --- spaces of real networks


class Residual(nn.Module):
    """Two convolutions whose outputs are added, a depthwise one, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12 * 16, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.branch(x)
        x = torch.relu(self.point(self.depthwise(x)))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


EXAMPLE = (torch.randn(2, 1, 8, 8),)


def test_widths_that_go_together_become_one_choice():
    space = find_space(Residual(), EXAMPLE, SpaceOptions(search=("width",)), "nas")
    assert set(space.choices) == {"stem.width", "point.width"}  # the addition joins stem and branch; the head stays
    assert space.layers["branch"].out.choice == space.layers["branch"].inp.choice == "stem.width"
    assert space.layers["depthwise"].out.choice == space.layers["bn"].out.choice == "stem.width"
    assert space.layers["fc"].inp == Axis(choice="point.width", repeat=16) and space.layers["fc"].out is None
    assert space.architectures == 9


@pytest.mark.parametrize("make", [Residual, TinyCNN])
def test_every_network_of_a_space_is_a_plain_network_that_computes_as_the_supernet_says(make):
    torch.manual_seed(0)
    model = make().eval()
    space = find_space(model, EXAMPLE, SpaceOptions(), "nas")
    selection = Selection(space)
    supernet = make_supernet(model, selection).eval()
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        chosen = random_network(space, generator)
        network = subnet(supernet, selection, chosen)
        assert not any(type(module).__module__.startswith("eff_nas") for module in network.modules())
        one_hot = {
            name: torch.tensor([float(value == chosen[name]) for value in choice.values])
            for name, choice in space.choices.items()
        }
        for single in (True, False):
            selection.use(one_hot, single)
            torch.testing.assert_close(supernet(*EXAMPLE), network(*EXAMPLE), rtol=1e-4, atol=1e-5)


def test_the_largest_network_is_the_one_before():
    torch.manual_seed(0)
    model = Residual().eval()
    expected = model(*EXAMPLE)
    space = find_space(model, EXAMPLE, SpaceOptions(), "nas")
    selection = Selection(space)
    made = discretise(make_supernet(model, selection), selection, space.largest)
    assert torch.equal(made(*EXAMPLE), expected)


def test_the_expected_share_is_the_mean_over_networks():
    torch.manual_seed(0)
    space = find_space(TinyCNN(), EXAMPLE, SpaceOptions(search=("kernel",)), "nas")
    selection = Selection(space)
    supernet = make_supernet(TinyCNN(), selection)
    whole = sum(p.numel() for p in TinyCNN().parameters())
    sizes = []
    for values in itertools.product(*(choice.values for choice in space.choices.values())):
        network = subnet(supernet, selection, dict(zip(space.choices, values, strict=True)))
        sizes.append(sum(p.numel() for p in network.parameters()) / whole)
    assert float(expected_share(supernet)) == pytest.approx(sum(sizes) / len(sizes), rel=1e-5)


class Stage(nn.Module):
    """A stem and three equal blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.fc = nn.Linear(4 * 64, 4)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).flatten(1))


def test_depth_mixes_the_outputs_of_the_candidate_depths():
    torch.manual_seed(0)
    model = Stage().eval()
    space = find_space(model, EXAMPLE, SpaceOptions(search=(), depths=(1, 2, 3)), "nas")
    assert space.choices == {"blocks.depth": Choice(kind="depth", values=(1, 2, 3))}
    x = model.stem(*EXAMPLE)
    hidden = [model.blocks[:depth](x) for depth in (1, 2, 3)]
    selection = Selection(space)
    supernet = make_supernet(model, selection)
    a = torch.tensor([0.2, 0.3, 0.5])
    selection.use({"blocks.depth": a}, False)
    torch.testing.assert_close(supernet.blocks(x), sum(w * h for w, h in zip(a, hidden, strict=True)))
    network = subnet(supernet, selection, {"blocks.depth": 2})
    assert len(network.blocks) == 2
    torch.testing.assert_close(network.blocks(x), hidden[1])


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Sequential(nn.Flatten()), SpaceOptions(), UnsupportedModelError, "found nothing to choose in Sequential"),
        (TinyCNN(), SpaceOptions(kernels=(3, 5)), ConfigError, "5 is larger than the kernel of 'conv1', which is 3"),
        (TinyCNN(), SpaceOptions(include=("conv4",)), ConfigError, "include names 'conv4'.*did you mean 'conv"),
        (Stage(), SpaceOptions(depths=(2, 5)), ConfigError, "no row of equal blocks is 5 long"),
    ],
)
def test_spaces_that_cannot_be_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        find_space(model, EXAMPLE, options, "nas")


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(self.stem(x))).mean((2, 3))


def test_shared_and_parametrized_layers_are_refused():
    with pytest.raises(UnsupportedModelError, match="'conv' is used more than once"):
        find_space(Shared(), EXAMPLE, SpaceOptions(), "nas")
    model = TinyCNN()
    nn.utils.parametrizations.spectral_norm(model.conv2)
    with pytest.raises(UnsupportedModelError, match="'conv2' is computed"):
        find_space(model, EXAMPLE, SpaceOptions(), "nas")


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ((3, 4), "kernel", "kernel candidates must be odd, got 4; an even kernel has no centre"),
        ((5, 3), "kernel", "kernel candidates must be above 0 and increase"),
        ((8, 8), "width", "width candidates must be above 0 and increase"),
    ],
)
def test_candidates_are_checked(values, kind, message):
    with pytest.raises(ValueError, match=message):
        Choice(kind=kind, values=values)
    with pytest.raises(ValueError, match="kernel 5 is larger than the layer's, which is 3"):
        kernel_table((3, 5), 3)
    with pytest.raises(ValueError, match="candidate 9 is larger than the layer, which has 8"):
        axis_table(Axis(choice="o"), (4, 9), 8)


def test_a_genotype_survives_its_file_and_a_wrong_one_is_refused(tmp_path):
    from eff.schemas import ModelSpec

    space = find_space(TinyCNN(), EXAMPLE, SpaceOptions(), "nas")
    genotype = Genotype(model=ModelSpec(source="a:b"), space=space, chosen=space.largest)
    path = tmp_path / "g.json"
    path.write_text(genotype.model_dump_json())
    assert read_genotype(path) == genotype
    name = next(iter(space.choices))
    path.write_text(genotype.model_copy(update={"chosen": {**space.largest, name: 77}}).model_dump_json())
    with pytest.raises(ModelError, match=f"{name} is 77; candidates are"):
        read_genotype(path)
    path.write_text("{}")
    with pytest.raises(ModelError, match="is no genotype"):
        read_genotype(path)
    with pytest.raises(ModelError, match="name an existing file"):
        read_genotype(tmp_path / "none.json")


# --- the rest


def test_recalibration_takes_plain_means_over_the_batches():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(4, 3, 5, 5) + index for index in range(3)]
    assert recalibrate(norm, batches, lambda model, batch: model(batch)) == 1
    torch.testing.assert_close(norm[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    assert norm[0].momentum == 0.1 and norm.training


def test_rank_correlation_and_alignment_agree_with_scipy_and_their_definition():
    stats = pytest.importorskip("scipy.stats", reason="the reference of Kendall's tau is scipy's")
    a, b = [1.0, 3.0, 2.0, 2.0, 5.0], [2.0, 1.0, 4.0, 4.0, 9.0]
    assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    x = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1.0, abs=1e-5)
    assert linear_cka(x, torch.randn(50, 6)) < 0.6


def test_the_two_parts_of_the_training_data_share_no_sample():
    split = BlobSplit(40, 0)
    first, second = split_for_search(split, 0.5, torch.Generator().manual_seed(0))
    assert sorted(first.indices + second.indices) == list(range(40)) and len(first) == 20
    with pytest.raises(DataError, match="cannot be divided"):
        split_for_search(BlobSplit(1, 0), 0.5, torch.Generator())


def test_macro_networks_have_the_codes_shapes():
    toy = MacroNet(MacroOptions())
    assert toy(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    space = find_space(toy, (torch.randn(2, 3, 32, 32),), SpaceOptions(), "nas")
    assert space.architectures == 6561 and math.prod(len(c.values) for c in space.choices.values()) == 6561
    assert space.values_of("conv1.width") == (8, 16, 32) and space.values_of("conv4.kernel") == (3, 5, 7)
    digits = MacroNet(DigitsMacroOptions())
    options = SpaceOptions(kernels=(1, 3, 5))
    assert find_space(digits, (torch.randn(2, 1, 8, 8),), options, "nas").architectures == 729
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        MacroOptions(kernel=4)
