"""quant_kit.diffusion: the schedule, the sampler, the Frechet distance and the time-aware quantizers."""

import copy
import math

import pytest
import torch
from torch import nn

from eff.errors import RunError, UnsupportedModelError
from eff_quant_kit.diffusion.frechet import digit_features, frechet_distance, pca_features
from eff_quant_kit.diffusion.lookup import blocks, time_layers
from eff_quant_kit.diffusion.models import DigitsDiT, DigitsUNet
from eff_quant_kit.diffusion.sampling import guided_noise, predict_noise, trajectories
from eff_quant_kit.diffusion.schedule import Schedule
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions
from eff_quant_kit.diffusion.time_aware import TimeAwareQuantizer, follow_timesteps, set_timestep


def test_the_ddim_and_ddpm_steps_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="the independent schedulers are in diffusers")
    theirs = diffusers.DDIMScheduler(
        100, 1e-3, 0.2, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    theirs.set_timesteps(100)
    ours, generator = Schedule(), torch.Generator().manual_seed(0)
    x, noise, fresh = (torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([3, 90])
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-5)
    for moment, eta in ((99, 0.0), (50, 0.0), (50, 1.0), (0, 0.0)):
        expected = theirs.step(noise, moment, x, eta=eta, variance_noise=fresh).prev_sample
        torch.testing.assert_close(ours.step(x, noise, moment, moment - 1, eta, fresh), expected, rtol=1e-5, atol=1e-5)


def test_eta_one_between_neighbours_has_the_posterior_mean_of_ddpm():
    schedule, t = Schedule(), 40
    x, eps = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-0.7]], dtype=torch.float64)
    a, before = schedule.alphas[t], schedule.alphas[t - 1]
    beta = 1 - a / before
    expected = (x - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()  # DDPM eq. 11
    torch.testing.assert_close(schedule.step(x, eps, t, t - 1, 1.0, torch.zeros_like(x)), expected)


def test_the_true_noise_leads_back_to_the_clean_image():
    schedule, x, noise = Schedule(), torch.rand(3, 2).double(), torch.randn(3, 2).double()
    noisy = schedule.add_noise(x, noise, torch.full((3,), 70))
    torch.testing.assert_close(schedule.step(noisy, noise, 70, -1), x)


@pytest.mark.parametrize("count", [0, 101])
def test_a_sampler_with_impossible_steps_is_refused(count):
    with pytest.raises(ValueError, match=f"between 1 and 100, got {count}"):
        Schedule().respaced(count)


def test_the_frechet_distance_is_the_one_through_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    torch.manual_seed(0)
    a, b = torch.randn(200, 5).double() @ torch.randn(5, 5).double(), 0.5 + torch.randn(150, 5).double()
    c1, c2 = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + (c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_features_have_32_numbers():
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    images = torch.randn(40, 1, 8, 8)
    assert digit_features(images).shape == pca_features(images)(images).shape == (40, 32)


@pytest.mark.parametrize("model", [DigitsDiT(width=16, depth=2), DigitsUNet(width=8)], ids=["dit", "unet"])
def test_layers_fed_by_the_time_alone_are_found(model):
    x, t = torch.randn(2, 3, 1, 8, 8), torch.tensor([1, 50, 99])
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = time_layers(model, linear, lambda which: model(x[which], t, class_labels=torch.tensor([0, 1, 2])))
    assert found == [name for name in linear if "time_embed" in name or "adaln" in name or "emb_layer" in name]


def test_blocks_are_found_or_the_lists_are_named():
    assert list(blocks(DigitsDiT(width=16, depth=2))) == ["blocks.0", "blocks.1"]
    with pytest.raises(UnsupportedModelError, match="no list of blocks called transformer_blocks, blocks, layers"):
        blocks(nn.Linear(2, 2))


def quantizer(timesteps=(90, 10)):
    made = TimeAwareQuantizer(4, timesteps, channels=2, axis=-1)
    made.set_range(0, torch.tensor([-1.0, -2.0]), torch.tensor([2.0, 1.0]))
    made.set_range(1, torch.tensor([0.0, -1.0]), torch.tensor([15.0, 14.0]))
    return made


def test_each_sample_is_quantized_by_the_set_of_its_timestep():
    q, x = quantizer(), torch.tensor([[0.29, 0.29], [0.29, 7.4]])
    q.select(torch.tensor([80, 12]))
    torch.testing.assert_close(q(x), torch.tensor([[0.2, 0.2], [0.0, 7.0]]))  # steps 0.2, and 1
    q.select(torch.tensor([50]))
    assert q.active.tolist() == [0]  # half way: the noisier set


def test_the_gradients_are_those_of_the_formula():
    q = quantizer()
    q.zero_point.requires_grad_(True)
    q.select(torch.tensor([10]))
    x = torch.tensor([[-3.0, 7.4]], requires_grad=True)
    q(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0]]
    # below: (0 - z) s has d/ds = -z = 0 and d/dz = -s = -1; inside: round(x/s) - x/s = -0.4, and z cancels
    torch.testing.assert_close(q.scale.grad, torch.tensor([[0.0, 0.0], [0.0, -0.4]]))
    torch.testing.assert_close(q.zero_point.grad, torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))


def test_clamp_and_the_form_with_two_relus_have_the_same_gradients():
    v = torch.linspace(-3, 20, 47, requires_grad=True)
    torch.manual_seed(0)
    weight = torch.rand(47)
    low = v + torch.relu(0 - v)
    by_relu = torch.autograd.grad((weight * (low - torch.relu(low - 15))).sum(), v)[0]
    torch.testing.assert_close(torch.autograd.grad((weight * v.clamp(0, 15)).sum(), v)[0], by_relu)


def test_a_constant_channel_is_kept():
    q = TimeAwareQuantizer(4, [0], channels=2, axis=-1)
    assert q.set_range(0, torch.tensor([0.7, 0.0]), torch.tensor([0.7, 0.0])) == 2
    q.select(torch.tensor([0]))
    torch.testing.assert_close(q(torch.tensor([[0.7, 0.0]])), torch.tensor([[0.7, 0.0]]))


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = quantizer()

    def forward(self, x, t):
        return self.q(x)


def test_a_model_that_follows_timesteps_switches_by_itself_also_as_a_copy():
    model, x = follow_timesteps(Timed()), torch.full((1, 2), 0.7)
    assert copy.deepcopy(model)(x, torch.tensor([99])).tolist() != model(x, torch.tensor([0])).tolist()
    with pytest.raises(RunError, match="outside a model that follow_timesteps"):
        quantizer()(x)


def test_a_timestep_without_a_set_is_refused():
    q = TimeAwareQuantizer(4, [5])
    q.select(torch.tensor([5]))
    with pytest.raises(RunError, match="no timestep has been calibrated"):
        q(torch.ones(1, 3))


def test_guidance_mixes_both_halves_of_one_call():
    model = DigitsDiT(width=16, depth=1).eval()
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        t = torch.full((2,), 30)
        one, free = predict_noise(model, x, t, labels), predict_noise(model, x, t, torch.full((2,), 10))
        torch.testing.assert_close(guided_noise(model, x, 30, labels, 1.5, 10), free + 1.5 * (one - free))


def test_a_model_without_a_timestep_and_a_path_with_nan_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"Linear is no denoiser: its forward must be model\(x, t"):
        predict_noise(nn.Linear(2, 2), torch.ones(1, 2), torch.ones(1), None)
    model = DigitsDiT(width=16, depth=1)
    nn.init.constant_(model.final.bias, math.nan)
    with pytest.raises(RunError, match="prediction at timestep 99 holds NaN"):
        trajectories(model, Schedule(), [99, 0], torch.tensor([1]), (1, 8, 8), torch.Generator())


def test_diffusers_models_fit():
    diffusers = pytest.importorskip("diffusers", reason="the model is in diffusers")
    model = diffusers.UNet2DModel(
        8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, num_class_embeds=11,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    assert predict_noise(model, torch.ones(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 10])).shape == (
        2,
        1,
        8,
        8,
    )


def test_evaluation_repeats_itself_and_images_are_fed_from_minus_one_to_one():
    task = Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=("a", "b")))
    model = DigitsDiT(width=16, depth=1, classes=2).eval()
    batch = {"image": torch.rand(4, 1, 8, 8), "label": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():
        torch.testing.assert_close(task.forward(model, batch), task.forward(model, batch))


def test_a_timestep_between_the_sets_takes_the_nearest_with_a_warning(recwarn):
    quantizer = TimeAwareQuantizer(8, [80, 40, 0])
    model = nn.Sequential(quantizer)
    set_timestep(model, torch.tensor([80, 0]))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="takes those of the nearest calibrated one"):
        set_timestep(model, torch.tensor([70, 5]))
    assert quantizer.active.tolist() == [0, 2]
