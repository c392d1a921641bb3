"""Two small denoisers for the digits: a transformer (after DiT, Peebles and Xie, arXiv:2212.09748) and a U-Net."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ModelError, did_you_mean
from eff.run import Run
from eff.schemas import ModelSpec
from eff.seeding import derive_seed


class MatMul(nn.Module):
    """A matrix product of two activations, as a module so that its operands can be quantized."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left @ right."""
        return left @ right


class Condition(nn.Module):
    """Sinusoidal time embedding through two layers, plus the label's embedding."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.waves = width // 2
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.labels = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return (N, width)."""
        half = self.waves
        rates = torch.exp(-math.log(1000.0) * torch.arange(half, device=t.device) / half)
        angles = t[:, None].float() * rates
        c = self.fc2(F.silu(self.fc1(torch.cat([angles.sin(), angles.cos()], 1))))
        if self.labels is not None:
            null = torch.full_like(t, self.labels.num_embeddings - 1)
            c = c + self.labels(null if labels is None else labels)
        return F.silu(c)


class Attention(nn.Module):
    """Self-attention with its projections and products as modules of their own."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.qk_matmul, self.av_matmul = MatMul(), MatMul()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, tokens, width)."""
        n, tokens, width = x.shape
        q, k, v = (f(x).view(n, tokens, self.heads, -1).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        scores = self.qk_matmul(q, k.transpose(-1, -2)) / math.sqrt(width // self.heads)
        out = self.av_matmul(scores.softmax(-1), v)
        result: Tensor = self.to_out(out.transpose(1, 2).reshape(n, tokens, width))
        return result


class Block(nn.Module):
    """Transformer block with adaptive layer norm: the condition sets shift, scale and gate."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaln = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return (N, tokens, width) for x like it and the condition c (N, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2))
        return x + gate2 * self.fc2(hidden)


class DigitsDiT(nn.Module):
    """Patches of 2 x 2, `depth` blocks with adaLN, a linear layer back to pixels."""

    def __init__(
        self, width: int = 64, depth: int = 3, heads: int = 4, classes: int = 10, channels: int = 1, size: int = 8
    ):
        super().__init__()
        tokens = (size // 2) ** 2
        self.channels, self.side = channels, size // 2
        self.patch_embed = nn.Linear(4 * channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.time_embed = Condition(width, classes)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_adaln = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the noise (N, C, H, W)."""
        n = len(x)
        patches = (
            x.view(n, self.channels, self.side, 2, self.side, 2)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(n, -1, 4 * self.channels)
        )
        c = self.time_embed(t, class_labels)
        h = self.patch_embed(patches) + self.position
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_adaln(c)[:, None].chunk(2, -1)
        out = self.final(self.final_norm(h) * (1 + scale) + shift)
        return out.view(n, self.side, self.side, self.channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class ResBlock(nn.Module):
    """Two convolutions with group norm; the condition is added between them."""

    def __init__(self, before: int, after: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, before), nn.GroupNorm(4, after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.emb_layer = nn.Linear(width, after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return (N, after, H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.emb_layer(c)[:, :, None, None]
        result: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return result


class DigitsUNet(nn.Module):
    """Two resolutions, attention at the lower one, one skip connection."""

    def __init__(self, width: int = 32, heads: int = 4, classes: int = 10, channels: int = 1, size: int = 8):
        super().__init__()
        self.time_embed = Condition(2 * width, classes)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down1 = ResBlock(width, width, 2 * width)
        self.reduce = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = ResBlock(2 * width, 2 * width, 2 * width)
        self.attn_norm = nn.GroupNorm(4, 2 * width)
        self.attn = Attention(2 * width, heads)
        self.middle = ResBlock(2 * width, 2 * width, 2 * width)
        self.grow = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up1 = ResBlock(2 * width, width, 2 * width)
        self.norm_out = nn.GroupNorm(4, width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the noise (N, C, H, W)."""
        c = self.time_embed(t, class_labels)
        skip = self.down1(self.conv_in(x), c)
        h = self.down2(self.reduce(skip), c)
        h = h + self.attn(self.attn_norm(h).flatten(2).transpose(1, 2)).transpose(1, 2).view(h.shape)
        h = self.grow(F.interpolate(self.middle(h, c), scale_factor=2.0))
        result: Tensor = self.conv_out(F.silu(self.norm_out(self.up1(torch.cat([h, skip], 1), c))))
        return result


MODELS: dict[str, Any] = {"digits_dit": DigitsDiT, "digits_unet": DigitsUNet}


def build(spec: ModelSpec, run: Run) -> nn.Module:
    """Return the model of `diffusion:NAME`; initial weights depend on the run's seed and the source.

    Raises:
        ModelError: unknown name or option.
    """
    if spec.name not in MODELS:
        raise ModelError(
            f"{spec.source}: there is no such model{did_you_mean(spec.name, MODELS)}; known: {', '.join(MODELS)}"
        )
    defaults = run.task.model_options() if run.task.name == "diffusion" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"build_model/{spec.source}"))
        try:
            model: nn.Module = MODELS[spec.name](**{**defaults, **spec.options})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{spec.source}: {str(error).splitlines()[0]}") from error
    return model


def trained_model(kind: str = "digits_dit", seed: int = 0, updates: int = 2500, **options: Any) -> nn.Module:
    """Return a model trained on the digits' training split: Adam 2e-3 to 0 (cosine), batches of 64; for claims."""
    from eff.data import load_data
    from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions

    task = Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=tuple("0123456789")))
    split = load_data(f"digits?seed={seed}").split("train")
    batch = split.batch(range(len(split)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = MODELS[kind](**options)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        model.train()
        for _ in range(updates):
            rows = torch.randint(len(split), (64,))
            chosen = {key: value[rows] for key, value in batch.items()}
            optimizer.zero_grad()
            task.loss(task.forward(model, chosen), chosen).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()
