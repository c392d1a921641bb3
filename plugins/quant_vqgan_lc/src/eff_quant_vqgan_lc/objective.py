"""What a training step minimises (VQGAN-LC's reference code).

    q     = w_encoder mean |sg(z_q) - z|^2 + w_codebook mean |z_q - sg(z)|^2      the reverse of VQ-VAE's weighting
    total = mean |x - x^| + rate_p perceptual(x, x^) + rate_q q + w_d L_gan
    L_gan = -mean D(x^),   w_d = rate_d clip(|grad(rec + rate_p perceptual)| / (|grad L_gan| + 1e-4), 0, 1e4)

with both gradients taken at the decoder's last layer. In place of LPIPS: mean |phi(x) - phi(x^)| / mean |phi(x)|, the mean of it
over some layers of a frozen network; the ratio is free of the network's units. Discriminator: hinge loss, an Adam of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff.run import Run, Step, StepResult
from eff.schemas import Metric
from eff_quant_vqgan_lc.config import VQGANLCConfig
from eff_quant_vqgan_lc.discriminator import SMALLEST, Discriminator, hinge_loss
from eff_quant_vqgan_lc.features import FrozenFeatures
from eff_quant_vqgan_lc.model import PLUGIN, Coded, Tokenizer
from eff_quant_vqgan_lc.usage import Usage

GRADIENT_EPS, WEIGHT_MAX = 1e-4, 1e4
ADAM_EPS, TINY = 1e-7, 1e-12


def quantizer_loss(z: Tensor, z_q: Tensor, w_encoder: float, w_codebook: float) -> Tensor:
    """Return q of latents and entries (T, d); entries that learn from no gradient (EMA, fixed) have the first term alone."""
    loss = w_encoder * (z_q.detach() - z).square().mean()
    return loss + w_codebook * (z_q - z.detach()).square().mean() if z_q.requires_grad else loss


def perceptual_loss(network: FrozenFeatures, image: Tensor, again: Tensor) -> Tensor:
    """Return the mean over layers of mean |phi(x) - phi(x^)| / mean |phi(x)|, of images in [-1, 1]; replaces LPIPS."""
    with torch.no_grad():
        wanted = network((image + 1) / 2)
    found = network((again + 1) / 2)
    losses = [
        (own - other).abs().mean() / other.abs().mean().clamp(min=TINY)
        for own, other in zip(found, wanted, strict=True)
    ]
    return torch.stack(losses).mean()


def adaptive_weight(base: Tensor, gan: Tensor, last: Tensor) -> Tensor:
    """Return clip(|grad base| / (|grad gan| + 1e-4), 0, 1e4), the gradients taken at the parameter `last`."""
    (of_base,) = torch.autograd.grad(base, last, retain_graph=True)
    (of_gan,) = torch.autograd.grad(gan, last, retain_graph=True)
    return (of_base.norm() / (of_gan.norm() + GRADIENT_EPS)).clamp(0, WEIGHT_MAX).detach()


class Objective:
    """Losses, discriminator and counts of a training."""

    def __init__(self, model: Tokenizer, config: VQGANLCConfig, run: Run):
        self.config = config
        channels, *sides = run.task.options.input_shape
        self.usage = Usage(len(model.codebook.table))
        self.last_epoch: Usage | None = None
        self.epoch = 0
        self.perceptual: FrozenFeatures | None = None
        if config.rate_p > 0:
            source = config.perceptual or config.features
            self.perceptual = FrozenFeatures(source, config.perceptual_layers, None).to(run.device)
        self.discriminator: Discriminator | None = None
        if config.rate_d > 0:
            if min(sides) < SMALLEST:
                raise UnsupportedModelError(
                    f"{PLUGIN}: the discriminator needs images of at least {SMALLEST} pixels, these are "
                    f"{sides[0]}x{sides[1]}; use larger ones or rate_d=0"
                )
            self.last = _last_layer(model)
            self.discriminator = Discriminator(channels, config.disc_width).to(run.device)
            self.optimizer = torch.optim.Adam(
                self.discriminator.parameters(), config.lr, betas=config.betas, eps=ADAM_EPS
            )

    def step(self, step: Step) -> StepResult:
        """Do one step of the autoencoder and, once it has started, one of the discriminator."""
        config, optimizer = self.config, step.optimizer
        assert optimizer is not None  # the method counts no steps of its own
        image = 2 * step.batch["image"] - 1
        out: Coded = step.model(image, details=True)
        self._count(out.codes, step.epoch)
        rec = (image - out.image).abs().mean()
        base = rec
        if self.perceptual is not None:
            base = rec + config.rate_p * perceptual_loss(self.perceptual, image, out.image)
        q = quantizer_loss(out.z, out.z_q, config.w_encoder, config.w_codebook)
        total = base + config.rate_q * q
        notes = {"rec": rec, "q": q}
        is_on = self.discriminator is not None and step.index >= config.disc_start
        if is_on and self.discriminator is not None:
            self.discriminator.train()
            gan = -self.discriminator(out.image).mean()
            total = total + config.rate_d * adaptive_weight(base, gan, self.last) * gan
            notes["gan"] = gan
        step.backward(total)
        if step.run.train.clip_norm and step.last_of_step:
            nn.utils.clip_grad_norm_(step.model.parameters(), step.run.train.clip_norm)
        optimizer.step()
        if is_on:
            notes["disc"] = self._discriminate(image, out.image.detach(), optimizer.param_groups[0]["lr"])
        return StepResult(total.detach(), {name: Metric(value=float(value.detach())) for name, value in notes.items()})

    def _discriminate(self, real: Tensor, fake: Tensor, lr: float) -> Tensor:
        assert self.discriminator is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = hinge_loss(self.discriminator(real), self.discriminator(fake))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _count(self, codes: Tensor, epoch: int) -> None:
        """Count which entries are used, by epoch: use at any time in training would say little."""
        if epoch != self.epoch:
            self.close_epoch()
            self.epoch = epoch
        self.usage.update(codes)

    def close_epoch(self) -> None:
        """Keep the counts of the epoch that ends."""
        if self.usage.tokens:
            self.last_epoch, self.usage = self.usage, Usage(self.usage.entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the discriminator, its optimiser and the counts of the epoch."""
        state: dict[str, Any] = {"epoch": self.epoch, "counts": self.usage.counts}
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.epoch, self.usage.counts = state["epoch"], state["counts"]
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])


def _last_layer(model: Tokenizer) -> Tensor:
    """Return the weight of the decoder's last convolution, which is `conv_out` in VQGAN's."""
    own = getattr(model.decoder, "conv_out", None)
    found = [module for module in model.decoder.modules() if isinstance(module, nn.Conv2d)]
    last = own if isinstance(own, nn.Conv2d) else found[-1] if found else None
    if last is None:
        raise UnsupportedModelError(f"{PLUGIN}: the decoder has no convolution to weigh the GAN loss by; use rate_d=0")
    return last.weight
