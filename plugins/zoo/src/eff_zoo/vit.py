"""Vision Transformers (ViT: Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; DeiT: Touvron et al., ICML 2021,
arXiv:2012.12877).

    z_0 = [class token; patches E] + positions          eq. 1
    z' = MSA(LN(z)) + z,   z = MLP(LN(z')) + z'         eq. 2, 3
    MSA: softmax(q k^T / sqrt(d)) v                     appendix A

`vit_tiny` has DeiT-tiny's width, depth and heads (and its parameter names); `vit_micro` trains on digits
and CIFAR on a desk. The two products of the attention are modules, so that a method can find and change them.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.init import normal_, xavier_uniform_, zeros_

from eff_zoo.options import ZooOptions

_EPS = 1e-6
_TOKEN_STD = 0.2  # the papers have 0.02; with a few thousand images this finds the positions in far fewer epochs


class ViTTinyOptions(ZooOptions):
    """Options of zoo:vit_tiny; the defaults are DeiT-tiny's."""

    image_size: int = Field(32, ge=1, description="Height and width in pixels; unset: the task's.")
    patch_size: int | None = Field(
        None, ge=1, description="Side of a patch in pixels; unset: 16 from 128 px on, 4 from 16 px on, 2 below."
    )
    dim: int = Field(192, ge=1, description="Width; a multiple of heads.")
    depth: int = Field(12, ge=1, description="Number of blocks.")
    heads: int = Field(3, ge=1, description="Attention heads per block.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over dim.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout after both parts of a block.")

    @property
    def patch(self) -> int:
        """The side of a patch in pixels."""
        if self.patch_size is not None:
            return self.patch_size
        return 16 if self.image_size >= 128 else 4 if self.image_size >= 16 else 2

    @model_validator(mode="after")
    def _sizes_fit(self) -> ViTTinyOptions:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is no multiple of heads {self.heads}")
        return self


class ViTMicroOptions(ViTTinyOptions):
    """Options of zoo:vit_micro."""

    dim: int = Field(64, ge=1, description="Width; a multiple of heads.")
    depth: int = Field(4, ge=1, description="Number of blocks.")
    heads: int = Field(4, ge=1, description="Attention heads per block.")


class MatMul(nn.Module):
    """A product of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b`, (..., M, K) times (..., K, N)."""
        return a @ b


class Attention(nn.Module):
    """Multi-head self-attention with its products as modules."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qk_matmul = MatMul()
        self.softmax = nn.Softmax(dim=-1)
        self.av_matmul = MatMul()
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, tokens, dim) of `x` (N, tokens, dim)."""
        samples, tokens = x.shape[0], x.shape[1]
        qkv = self.qkv(x).reshape(samples, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = self.softmax(self.qk_matmul(q * self.scale, k.transpose(-2, -1)))
        mixed = self.av_matmul(weights, v).transpose(1, 2).reshape(samples, tokens, self.heads * self.head_dim)
        out: Tensor = self.drop(self.proj(mixed))
        return out


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, tokens, dim)."""
        out: Tensor = self.drop(self.fc2(self.act(self.fc1(x))))
        return out


class Block(nn.Module):
    """Attention and MLP, each with layer normalisation before and a residual around it."""

    def __init__(self, options: ViTTinyOptions):
        super().__init__()
        self.norm1 = nn.LayerNorm(options.dim, eps=_EPS)
        self.attn = Attention(options.dim, options.heads, options.dropout)
        self.norm2 = nn.LayerNorm(options.dim, eps=_EPS)
        self.mlp = MLP(options.dim, int(options.dim * options.mlp_ratio), options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, tokens, dim)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """The linear map of patches, as a convolution."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Return (N, patches, dim)."""
        patches: Tensor = self.proj(image).flatten(2).transpose(1, 2)
        return patches


class VisionTransformer(nn.Module):
    """A ViT that classifies by its class token."""

    def __init__(self, options: ViTTinyOptions):
        super().__init__()
        patches = (options.image_size // options.patch) ** 2
        self.patch_embed = PatchEmbed(options.in_channels, options.dim, options.patch)
        self.cls_token = Parameter(normal_(torch.empty(1, 1, options.dim), std=_TOKEN_STD))
        self.pos_embed = Parameter(normal_(torch.empty(1, 1 + patches, options.dim), std=_TOKEN_STD))
        self.blocks = nn.Sequential(*(Block(options) for _ in range(options.depth)))
        self.norm = nn.LayerNorm(options.dim, eps=_EPS)
        self.head = nn.Linear(options.dim, options.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                xavier_uniform_(module.weight)
                zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_channels, image_size, image_size)."""
        patches = self.patch_embed(image)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits
