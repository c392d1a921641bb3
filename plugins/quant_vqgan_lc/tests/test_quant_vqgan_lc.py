"""VQGAN-LC: the search, who moves which entries, losses, tables, the token file, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from eff.data import Data, load_data
from eff.errors import ConfigError, DataError, EffError, RequestError, UnsupportedModelError
from eff.log import Log
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Recipe, TaskSpec, TrainOptions
from eff.session import Chosen, Plugins
from eff.tasks import Classification, ClassificationOptions
from eff.training import Training
from eff.use import UseRequest, evaluate, export_model, predict
from eff_quant_vqgan_lc import claims
from eff_quant_vqgan_lc.autoencoder import SIZES, Autoencoder, AutoencoderOptions, make_autoencoder
from eff_quant_vqgan_lc.codebook import Codebook, EMACodebook, make_codebook, make_projector, principal_components
from eff_quant_vqgan_lc.config import VQGANLCConfig
from eff_quant_vqgan_lc.discriminator import Discriminator, hinge_loss
from eff_quant_vqgan_lc.features import FrozenFeatures, _as_map
from eff_quant_vqgan_lc.insert import insert
from eff_quant_vqgan_lc.model import Tokenizer
from eff_quant_vqgan_lc.objective import adaptive_weight, perceptual_loss, quantizer_loss
from eff_quant_vqgan_lc.pictures import load
from eff_quant_vqgan_lc.plugin import VQGANLC
from eff_quant_vqgan_lc.table import make_table, patch_features, read_table
from eff_quant_vqgan_lc.task import ReconstructionMeter, Tokenization, TokenizationOptions
from eff_quant_vqgan_lc.usage import Usage

EFF_PLUGIN = "quant_vqgan_lc"
BLOBS = "pictures:eff.testing.samples:blobs?train=64&test=32"
NETWORK = "eff.testing.samples:tiny_cnn"
SMALL = dict(VQGANLC.sample.options)


class NoiseSplit:
    """Colour images of 16 x 16 pixels."""

    def __init__(self, samples, seed):
        self.images = torch.rand(samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.images)

    def batch(self, indices, generator=None):
        chosen = list(indices)
        return {"image": self.images[chosen], "label": torch.zeros(len(chosen), dtype=torch.long)}

    def fingerprint(self):
        return "noise"


def noise():
    return Data(
        DataSpec(scheme="noise"),
        TaskSpec(name="tokenization", options={"input_shape": [3, 16, 16]}),
        NoiseSplit(32, 0),
        NoiseSplit(8, 1),
    )


def test_contract(eff_contract_check):
    eff_contract_check()


def make_run(data=BLOBS, seed=0, **changes):
    found = load(DataSpec.parse(data), None) if isinstance(data, str) else data
    task = Tokenization(TokenizationOptions(**found.task.options))
    return Run(task, torch.device("cpu"), seed, found, train=CORE_TRAINING, log=Log(), **changes)


def config(**changes):
    return VQGANLCConfig(**{**SMALL, **changes})


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the contract's sample."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    use = MethodUse(name=EFF_PLUGIN, options=SMALL)
    recipe = Recipe(
        model="vqgan:tiny", data=BLOBS, methods=(use,), train=TrainOptions(epochs=2, batch_size=16), device="cpu"
    )
    return folder, apply(recipe, folder)


# The codebook


@settings(max_examples=25, deadline=None)
@given(
    t=st.integers(1, 40), n=st.integers(2, 60), d=st.integers(1, 9), chunk=st.integers(1, 70), seed=st.integers(0, 999)
)
def test_the_search_finds_what_all_distances_in_float64_say(t, n, d, chunk, seed):
    z, entries = normal(t, d, seed=seed), normal(n, d, seed=seed + 1)
    codes = Codebook(entries, False, chunk=chunk)(z).codes
    distances = (z.double()[:, None] - entries.double()[None]).square().sum(2)
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert float((chosen - distances.min(1).values).max()) < 1e-5  # float32: nearly equal ones may swap


def test_of_equally_near_entries_the_first_is_taken_in_every_block():
    entries = torch.tensor([[5.0], [1.0], [-1.0], [1.0], [1.0]])
    for chunk in (1, 2, 5):
        assert Codebook(entries, False, chunk=chunk)(torch.tensor([[1.0], [2.0]])).codes.tolist() == [1, 1]


def test_search_and_lookup_use_the_projected_table_also_where_widths_agree():
    table, z = normal(20, 4), normal(7, 4, seed=1)
    book = Codebook(table, False, make_projector("linear", 4, 4))
    found = book(z)
    projected = table @ book.projector.weight.t() + book.projector.bias
    torch.testing.assert_close(found.z_q, projected[found.codes])
    assert torch.equal(found.codes, torch.cdist(z, projected).argmin(1))
    assert not torch.allclose(found.z_q, table[found.codes])


def test_the_projector_starts_with_a_bias_and_weights_of_spread_d_to_the_minus_half():
    torch.manual_seed(0)
    linear = make_projector("linear", 768, 8)
    assert linear.bias is not None
    assert float(linear.weight.detach().std()) == pytest.approx(8**-0.5, rel=0.03)
    mlp = make_projector("mlp", 768, 8)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(256, 768), (256,), (8, 256), (8,)]


def moved_by_one_step(book, z):
    before = book.entries().detach().clone()
    learned = [parameter for parameter in book.parameters() if parameter.requires_grad]
    if learned:
        found = book(z)
        quantizer_loss(found.z, found.z_q, 1.0, 0.33).backward()
        torch.optim.SGD(learned, 0.5).step()
    codes = book(z).codes
    return (book.entries().detach() - before).abs().amax(1) > 0, codes


def test_one_selected_entry_moves_all_of_a_projected_table_and_only_itself_of_a_learned_one():
    z = torch.full((5, 4), 3.0)
    torch.manual_seed(0)
    shared = make_codebook(config(codebook="frozen_features", projector="linear", n_codes=30), normal(30, 6), 30)
    moved, codes = moved_by_one_step(shared, z)
    assert len(codes.unique()) == 1 and bool(moved.all())
    assert not shared.table.requires_grad
    own = make_codebook(config(codebook="random_tuned", n_codes=30), None, 30)
    moved, codes = moved_by_one_step(own, z)
    assert moved.nonzero()[:, 0].tolist() == codes.unique().tolist()
    fixed = make_codebook(config(codebook="random_fixed", n_codes=30), None, 30)
    assert not bool(moved_by_one_step(fixed, z)[0].any())


def test_random_entries_lie_within_one_over_n():
    table = make_codebook(config(codebook="random_tuned"), None, 50).table
    assert float(table.detach().abs().max()) <= 1 / 50 and float(table.detach().std()) == pytest.approx(
        1 / 50 / 3**0.5, rel=0.15
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(2, 6), decay=st.floats(0.5, 0.99))
def test_moving_averages_are_those_of_a_loop_in_float64(seed, n, decay):
    table = normal(n, 2, seed=seed)
    book = EMACodebook(table.clone(), decay).train()
    counts, sums, entries = np.ones(n), table.double().numpy().copy(), table.double().numpy().copy()
    for step in range(3):
        z = normal(9, 2, seed=seed + 10 + step)
        found = book(z)
        codes = found.codes.tolist()
        assert np.allclose(found.z_q.numpy(), entries[codes], atol=1e-4)
        new_counts, new_sums = np.zeros(n), np.zeros((n, 2))
        for row, code in enumerate(codes):
            new_counts[code] += 1
            new_sums[code] += z[row].double().numpy()
        counts, sums = decay * counts + (1 - decay) * new_counts, decay * sums + (1 - decay) * new_sums
        total = counts.sum()
        entries = sums / ((counts + 1e-5) / (total + n * 1e-5) * total)[:, None]
    assert np.allclose(book.table.numpy(), entries, atol=1e-4)
    still = book.table.clone()
    book.eval()(normal(9, 2))
    assert torch.equal(book.table, still)


def test_factorized_codes_are_compared_by_their_angle():
    book = make_codebook(config(codebook="factorized"), None, 12)
    z = 7 * normal(30, 4, seed=3)
    found = book(z)
    torch.testing.assert_close(book.entries().norm(dim=1), torch.ones(12))
    torch.testing.assert_close(found.z.norm(dim=1), torch.ones(30))
    angle = nn.functional.cosine_similarity(z[:, None], book.table[None], dim=2)
    assert torch.equal(found.codes, angle.argmax(1))


def test_distances_stay_in_float32_under_autocast():
    book = Codebook(normal(50, 6), False, make_projector("linear", 6, 4))
    z = 30 + normal(20, 4)  # far from 0, where squares in bfloat16 hold nothing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = book(z)
    assert found.z_q.dtype == torch.float32 and torch.equal(found.codes, book(z).codes)


def test_principal_components_are_those_of_the_singular_value_decomposition():
    table = normal(40, 6) * torch.tensor([5.0, 4, 3, 2, 1, 0.5]) + 3
    centred = (table - table.mean(0)).double().numpy()
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    found = principal_components(table, 3).double().numpy()
    assert np.allclose(np.abs(found), np.abs(centred @ rows[:3].T), atol=1e-4)
    assert np.allclose(found.mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["frozen_features", "tuned_features", "random_tuned", "random_fixed", "ema", "factorized"]
)
@pytest.mark.parametrize("projector", ["linear", "mlp", "none"])
def test_every_codebook_finishes_to_the_same_tokens_and_images(kind, projector):
    torch.manual_seed(0)
    book = make_codebook(config(codebook=kind, projector=projector, n_codes=20), normal(20, 6), 20).eval()
    model = Tokenizer(make_autoencoder("tiny", in_channels=1), 8, 4, book).eval()
    image = normal(2, 1, 8, 8)
    with torch.no_grad():
        tokens, again = model.tokens(image), model(image)
        model.codebook = book.finished()
        assert torch.equal(model.tokens(image), tokens)
        torch.testing.assert_close(model(image), again)
        torch.testing.assert_close(model.images(tokens), again)
    assert not list(model.codebook.parameters())


def test_gradients_pass_straight_through_and_never_reach_entries_by_the_reconstruction():
    torch.manual_seed(0)
    model = Tokenizer(make_autoencoder("tiny", in_channels=1), 8, 4, Codebook(normal(10, 4), True))
    seen = []
    model.post_quant_conv.register_full_backward_hook(lambda *call: seen.append(call[1][0]))
    model.quant_conv.register_full_backward_hook(lambda *call: seen.append(call[2][0]))
    model(normal(2, 1, 8, 8)).square().mean().backward()
    torch.testing.assert_close(seen[0], seen[1])
    assert model.codebook.table.grad is None or not bool(model.codebook.table.grad.any())


# Losses


def test_the_encoder_is_pulled_with_weight_1_and_the_codebook_with_a_third():
    z = torch.tensor([[2.0, 0.0]], requires_grad=True)
    e = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = quantizer_loss(z, e, 1.0, 0.33)
    assert loss.item() == pytest.approx(1.33 * (4 + 1) / 2)
    loss.backward()
    assert z.grad[0].tolist() == pytest.approx([2.0, -1.0])  # 2 (z - e) / 2
    assert e.grad[0].tolist() == pytest.approx([-0.66, 0.33])
    fixed = quantizer_loss(z.detach().requires_grad_(), e.detach(), 1.0, 0.33)
    assert fixed.item() == pytest.approx(2.5)


def test_the_gan_weight_is_the_clipped_ratio_of_gradients_at_the_last_layer():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    base, gan = (3 * w).sum(), (-0.5 * w).sum()
    assert adaptive_weight(base, gan, w).item() == pytest.approx(18**0.5 / (0.5**0.5 + 1e-4))
    assert adaptive_weight(1e6 * base, 0 * gan, w).item() == 1e4
    assert not adaptive_weight(base, gan, w).requires_grad


def test_the_hinge_loss_of_known_logits():
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item() == pytest.approx(0.5 * (0.5 + 1.0))
    shapes = [tuple(layer.weight.shape) for layer in Discriminator(3) if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1, 256, 4, 4)]


def test_the_perceptual_loss_is_the_relative_difference_of_maps_and_0_for_equal_images():
    network = FrozenFeatures(NETWORK, ("conv1", "conv3"), None)
    a, b = normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=1).requires_grad_()
    with torch.no_grad():
        first, second = network((a + 1) / 2), network((b + 1) / 2)
        expected = sum(float((x - y).abs().mean() / x.abs().mean()) for x, y in zip(first, second, strict=True)) / 2
    loss = perceptual_loss(network, a, b)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert bool(b.grad.any()) and perceptual_loss(network, a, a).item() == 0


@pytest.mark.parametrize(("start", "changes"), [(0, True), (99, False)])
def test_the_discriminator_learns_only_from_its_start_on(start, changes):
    options = SMALL | {"rate_d": 0.1, "disc_start": start, "disc_width": 4, "codebook": "random_tuned", "rate_p": 0}
    method = VQGANLC(VQGANLCConfig(**options))
    run = make_run(noise(), training=True)
    model = method.transform(model=make_autoencoder("tiny"), run=run)
    before = [parameter.clone() for parameter in method.objective.discriminator.parameters()]
    run.train = method.training().over(CORE_TRAINING)
    Training(model, run, Plugins([Chosen(EFF_PLUGIN, "", "", method)], extensions=())).run_all()
    after = list(method.objective.discriminator.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) is changes


# Use of the codebook


def test_utilisation_and_perplexity_of_known_counts():
    usage = Usage(4)
    assert usage.perplexity == 0
    usage.update(torch.tensor([[0, 0], [2, 2]]))
    assert (usage.tokens, usage.utilisation, usage.perplexity, usage.entropy) == (
        4,
        0.5,
        pytest.approx(2),
        pytest.approx(1),
    )


@settings(max_examples=30, deadline=None)
@given(codes=st.lists(st.integers(0, 7), min_size=1, max_size=60), parts=st.integers(1, 4))
def test_perplexity_is_two_to_the_entropy_however_the_codes_come(codes, parts):
    usage = Usage(8)
    for part in torch.tensor(codes).tensor_split(parts):
        usage.update(part)
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    assert usage.perplexity == pytest.approx(math.exp(-math.fsum(p * math.log(p) for p in shares)), rel=1e-9)
    assert usage.utilisation == len(set(codes)) / 8


def test_use_in_training_is_counted_over_the_last_epoch_alone(finished):
    _, report = finished
    values = report.after.metrics.values
    assert 0 < values["train_utilisation"].value <= 100
    method = VQGANLC(config())
    run = make_run(training=True)
    method.transform(model=make_autoencoder("tiny", in_channels=1), run=run)
    method.objective._count(torch.tensor([0, 1, 2]), 0)
    method.objective._count(torch.tensor([5]), 1)
    method.objective.close_epoch()
    assert method.objective.last_epoch.counts.nonzero()[:, 0].tolist() == [5]


# Tables


def test_patch_features_are_averages_of_the_layers_map_over_squares():
    network = FrozenFeatures(NETWORK, ("conv2",), None)
    split = load_data("eff.testing.samples:blobs?train=6").split("train")
    features, labels = patch_features(split, network, 4, torch.device("cpu"), Log())
    image = split.batch(range(6))["image"]
    with torch.no_grad():
        inner = network.network
        hooked = inner.conv2(inner.relu(inner.bn1(inner.conv1(image))))
    assert features.shape == (6, 4, 8) and labels.tolist() == [0, 1, 2, 3, 0, 1]
    torch.testing.assert_close(features[2, 1], hooked[2, :, :4, 4:].mean((1, 2)))


def test_the_papers_table_has_centres_of_each_class_and_only_of_it():
    centres = normal(3, 5) * 50

    class Split:
        def __len__(self):
            return 30

        def batch(self, indices, generator=None):
            labels = torch.tensor([index % 3 for index in indices])
            return {"image": labels.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), "label": labels}

    def network(image):
        labels = image[:, 0, 0, 0].long()
        return [centres[labels][:, :, None, None] + normal(len(image), 5, 2, 2, seed=int(labels[0]))]

    run = make_run()
    run.data = type(run.data)(run.data.spec, run.data.task, Split(), None)
    table = make_table(config(n_codes=12, centres_per_class=4, pool=1, table="per_class"), run, network)
    owner = torch.cdist(table, centres).argmin(1)
    assert owner.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_table_from_a_file_drops_nan_reports_copies_and_takes_as_many_rows_as_asked(tmp_path):
    rows = normal(12, 3)
    rows[2, 1] = float("nan")
    rows[5] = rows[4]
    np.save(tmp_path / "table.npy", rows.numpy())
    run = make_run()
    table = make_table(config(table=str(tmp_path / "table.npy"), n_codes=11), run, None)
    assert torch.equal(table, rows[[0, 1, *range(3, 12)]])
    assert "1 feature vectors of the table hold NaN" in run.log.warnings[0]
    assert "1 rows of the table repeat others" in run.log.warnings[1]
    few = make_table(config(table=str(tmp_path / "table.npy"), n_codes=5), make_run(), None)
    assert len(few) == 5 and all((table == row).all(1).any() for row in few)
    with pytest.raises(ConfigError, match="has 11 rows, n_codes asks for 12; lower it, or use another file"):
        make_table(config(table=str(tmp_path / "table.npy"), n_codes=12), make_run(), None)


def test_tables_are_read_from_every_kind_of_file_and_bad_ones_refused(tmp_path):
    from safetensors.torch import save_file

    rows = normal(4, 3)
    np.savez(tmp_path / "a.npz", rows.numpy())
    save_file({"x": rows}, tmp_path / "a.safetensors")
    torch.save({"x": rows}, tmp_path / "a.pt")
    torch.save(rows.double(), tmp_path / "b.pth")
    for name in ("a.npz", "a.safetensors", "a.pt", "b.pth"):
        torch.testing.assert_close(read_table(str(tmp_path / name)), rows)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    (tmp_path / "bad.npy").write_text("no array")
    for text, reason in (
        ("kmean", "none of per_class, kmeans, random"), (str(tmp_path / "none.npy"), "there is no file"),
        (str(tmp_path / "flat.npy"), r"has shape \(3,\); it must be"), (str(tmp_path / "bad.npy"), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            read_table(text)


@pytest.mark.parametrize(("kind", "rows"), [("kmeans", 32), ("random", 32), ("per_class", 32)])
def test_tables_of_features_have_the_rows_asked_for(kind, rows):
    run = make_run()
    network = FrozenFeatures(NETWORK, ("conv2",), None)
    table = make_table(config(table=kind, centres_per_class=10, n_codes=rows, pool=2), run, network)
    again = make_table(config(table=kind, centres_per_class=10, n_codes=rows, pool=2), make_run(), network)
    assert table.shape == (rows, 8) and torch.equal(table, again)


# Features


def test_features_stop_at_the_last_layer_and_never_train():
    network = FrozenFeatures(NETWORK, ("conv1",), 16)
    network.train()
    assert not network.network.training
    network.network.fc.register_forward_hook(lambda *call: pytest.fail("the classifier ran"))
    assert network(torch.rand(2, 1, 8, 8))[0].shape == (2, 8, 16, 16)


def test_tokens_of_a_transformer_become_a_map_without_the_class_token():
    tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    found = _as_map(tokens, "blocks.1")
    assert found.shape == (2, 3, 2, 2) and found[1, :, 0, 1].tolist() == tokens[1, 2].tolist()
    assert _as_map(tokens[:, :4], "blocks.1")[0, :, 0, 0].tolist() == tokens[0, 0].tolist()
    with pytest.raises(ConfigError, match=r"gives \(2, 3\), not a map"):
        _as_map(torch.zeros(2, 3), "fc")


# Autoencoder, task and files


@pytest.mark.parametrize(("size", "factor"), [("f16", 16), ("f8", 8), ("small", 8), ("tiny", 2)])
def test_the_autoencoders_reduce_by_their_factor_and_give_images_back(size, factor):
    options = AutoencoderOptions(**SIZES[size])
    with torch.device("meta"):
        model = Autoencoder(options)
        image = torch.zeros(1, 3, 64, 64)
        z = model.encoder(image)
        assert options.factor == factor
        assert z.shape == (1, options.z_channels, 64 // factor, 64 // factor) and model.decoder(z).shape == image.shape


def test_the_latent_of_the_f16_model_has_the_published_layers():
    with torch.device("meta"):
        model = Autoencoder(AutoencoderOptions())
    widths = [block.conv2.out_channels for block in model.encoder.levels if hasattr(block, "conv2")]
    assert widths == [128] * 4 + [256] * 4 + [512] * 2
    assert sum(hasattr(layer, "qkv") for layer in model.encoder.levels) == 2


def test_the_meter_states_psnr_and_leaves_ssim_out_below_its_window():
    meter = ReconstructionMeter()
    image = torch.full((2, 1, 8, 8), 0.5)
    meter.update(image + 0.1, {"image": image})
    values = meter.compute().values
    assert values["psnr"].value == pytest.approx(20, abs=1e-4) and "ssim" not in values
    meter = ReconstructionMeter()
    meter.update(torch.full((1, 3, 16, 16), 2.0), {"image": torch.ones(1, 3, 16, 16)})
    assert meter.compute().values["ssim"].value == pytest.approx(1) and meter.compute().values["psnr"].value == 100


def test_the_token_file_alone_gives_the_models_images(finished, tmp_path):
    from safetensors.torch import load_file

    folder, report = finished
    content = load_file(folder / "model.tokens")
    assert content["entries"].shape == (32, 4) and content["tokens.train"].shape == (64, 4, 4)
    assert content["labels.test"].tolist() == (torch.arange(32) % 4).tolist()
    model = Tokenizer(make_autoencoder("tiny", in_channels=1), 8, 4, Codebook(content["entries"], False)).eval()
    model.load_state_dict(
        {key: value for key, value in content.items() if "." in key and key.split(".")[0] not in ("tokens", "labels")},
        strict=False,
    )
    meter = ReconstructionMeter()
    image = load(DataSpec.parse(BLOBS), None).split("test").batch(range(32))["image"]
    meter.update((model.images(content["tokens.test"].long()) + 1) / 2, {"image": image})
    assert meter.compute().values["psnr"].value == pytest.approx(report.after.metrics.values["psnr"].value, abs=1e-4)


def test_the_file_to_ship_holds_projected_entries_and_no_table(finished):
    folder, _ = finished
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    assert [(key, tuple(value.shape)) for key, value in state.items() if key.startswith("codebook")] == [
        ("codebook.table", (32, 4))
    ]
    assert evaluate(UseRequest(str(folder), device="cpu")).metrics.values["test_utilisation"].value > 0


@pytest.mark.slow
def test_the_exported_graph_agrees_with_the_model(finished, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, _ = finished
    (artifact,) = export_model(UseRequest(str(folder), device="cpu"), ["onnx"], tmp_path)
    assert artifact.details["max_difference"] < 1e-3


def test_a_prediction_is_a_reconstruction_with_its_psnr_and_tokens(finished, tmp_path):
    from PIL import Image

    folder, _ = finished
    Image.fromarray((np.arange(64).reshape(8, 8) * 3).astype(np.uint8)).save(tmp_path / "in.png")
    request = UseRequest(str(folder), device="cpu")
    (shown,) = predict(request, [tmp_path / "in.png"])
    assert shown.rows[0]["tokens"] == "4x4" and "keeps the reconstruction" in shown.rows[0]["note"]
    (written,) = predict(request, [tmp_path / "in.png"], tmp_path / "out.png")
    again = np.asarray(Image.open(tmp_path / "out.png")).astype(float) / 255
    wanted = np.asarray(Image.open(tmp_path / "in.png")).astype(float) / 255
    assert -10 * math.log10(np.square(again - wanted).mean()) == pytest.approx(written.rows[0]["psnr"], abs=0.1)
    with pytest.raises(RequestError, match=r"'.pgn' is no image format; did you mean"):
        predict(request, [tmp_path / "in.png"], tmp_path / "out.pgn")


def test_pictures_are_those_of_the_inner_source_in_the_models_shape():
    found = load(DataSpec.parse(BLOBS), None)
    assert found.task.name == "tokenization" and found.task.options == {"input_shape": [1, 8, 8]}
    assert len(found.train) == 64 and str(found.spec) == BLOBS
    for text, reason in (("pictures", "names no images"), ("pictures:nowhere", "nowhere")):
        with pytest.raises(DataError, match=reason):
            load(DataSpec(scheme=text.partition(":")[0], location=text.partition(":")[2]), None)


# What is refused, and what is only said


def run_with(model="vqgan:tiny", data=BLOBS, batch=16, **options):
    use = MethodUse(name=EFF_PLUGIN, options=SMALL | options)
    return Recipe(model=model, data=data, methods=(use,), train=TrainOptions(epochs=1, batch_size=batch), device="cpu")


REFUSED = {
    "fewer rows than entries": (run_with(n_codes=5000), r"the table has 1024 rows, n_codes asks for 5000; lower it, or use more"),
    "odd image sides": (
        run_with("vqgan:tiny?multipliers=1,1,1,1,1"), r"images of 8x8, the model reduces sides 16 times; use \?size= with a multiple of 16",
    ),
    "no such layer": (run_with(feature_layer="conv9"), "has no module 'conv9'; did you mean 'conv"),
    "no map": (run_with(feature_layer="fc"), r"module 'fc' of the features gives \(16, 4\), not a map"),
    "pool too large": (run_with(pool=9), "pool is 9, the map of features 8x8"),
    "no such table": (run_with(table="k-means"), "table 'k-means' is none of per_class, kmeans, random"),
    "no such network": (run_with(features="zoo:efficientnet_lite"), "features: "),
    "no components left": (run_with(code_dim=9, projector="none"), "code_dim is 9, the table 8 wide"),
    "too small for a discriminator": (run_with(rate_d=0.1), "the discriminator needs images of at least 16 pixels, these are 8x8"),
    "a classifier": (run_with("eff.testing.samples:tiny_cnn"), "it does not reconstruct images|does not"),
    "another task": (run_with(NETWORK, "eff.testing.samples:blobs"), "is for tokenization, the model's task is classification"),
    "an unknown size": (run_with("vqgan:smal"), "there is no such model; did you mean 'small'"),
    "an unknown option": (run_with("vqgan:tiny?depth=3"), "option 'depth' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_in_one_line_before_anything_is_written(case, tmp_path):
    recipe, reason = REFUSED[case]
    with pytest.raises(EffError, match=reason) as caught:
        apply(recipe, tmp_path / "run")
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [{"n_codes": 1}, {"code_dim": 0}, {"betas": (1.0, 0.9)}, {"codebook": "restart"}, {"chunk": 0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        VQGANLCConfig(**options)


@pytest.mark.parametrize("kind", ["frozen_features", "tuned_features", "random_tuned", "ema"])
@pytest.mark.parametrize("projector", ["linear", "mlp", "none"])
def test_matched_entries_have_the_latents_mean_and_spread(kind, projector):
    torch.manual_seed(0)
    book = make_codebook(config(codebook=kind, projector=projector, n_codes=40), 30 * normal(40, 6) + 9, 40)
    z = 0.1 * normal(50, 4, seed=2) - 3
    book.match(z)
    entries = book.entries().detach()
    torch.testing.assert_close(entries.mean(0), z.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entries.std(0), z.std(0), atol=1e-4, rtol=1e-3)
    if kind == "ema":
        torch.testing.assert_close(book.sums, book.table)


def test_wide_latents_single_images_and_far_entries_are_allowed_and_said():
    run = make_run()
    insert(make_autoencoder("tiny", in_channels=1), config(code_dim=9), {}, run)
    assert "code_dim 9 is more than the table's width 8" in run.log.warnings[0]
    run = make_run()
    run.train = CORE_TRAINING.model_copy(update={"batch_size": 1})
    structure = {}
    options = config(codebook="ema", n_codes=1000, start="drawn")
    insert(make_autoencoder("tiny", in_channels=1), options, structure, run)
    assert "batches of one image" in run.log.warnings[0]
    assert "times as far as the latents" in run.log.warnings[1]  # +-1/N is a small cloud
    assert structure["start"]["entries_std"] < 0.1 * structure["start"]["latents_std"]


def test_a_network_without_encoder_and_decoder_is_refused():
    with pytest.raises(UnsupportedModelError, match="Sequential has no modules 'encoder' and 'decoder'"):
        insert(nn.Sequential(nn.Identity()), config(), {}, make_run())
    odd = nn.Module()
    odd.encoder, odd.decoder = nn.Conv2d(1, 4, 2, 2), nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"gives no images \(1, 8, 8\)"):
        insert(odd, config(), {}, make_run())
    classifier = Run(Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a",))), torch.device("cpu"))
    with pytest.raises(RequestError, match="needs an autoencoder of images; this model's task is classification"):
        insert(make_autoencoder("tiny", in_channels=1), config(), {}, classifier)


def test_ones_own_autoencoder_is_taken():
    own = nn.Module()
    own.encoder, own.decoder = nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(4, 1, 2, 2)
    model = insert(own, config(), {}, make_run())
    assert model.tokens(torch.zeros(2, 1, 8, 8)).shape == (2, 4, 4)


# The claim


def test_a_claim_without_its_photos_says_which_are_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("EFF_PHOTOS", raising=False)
    monkeypatch.setattr(claims, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "e" / "claims.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="needs 1000 photos in ../shared/data/imagenet1k_samples"):
        claims.photos()


def test_a_short_claim_measures_what_its_checks_name():
    found = claims.measure_all(noise(), normal(200, 12), 64, 2, 0, tuple(claims.SETTINGS))
    for check in VQGANLC.claims[0].checks:
        assert check.left in found and (not isinstance(check.right, str) or check.right in found)
    assert all(0 <= found[f"{name}_{key}"] <= 100 for name in claims.SETTINGS for key in ("train_use", "test_use"))
