"""An autoencoder with a codebook between encoder and decoder.

z = conv1x1(encoder(x)),   z_q = nearest entry of each z,   x^ = decoder(conv1x1(z + sg(z_q - z)))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff.modes import eval_mode
from eff_quant_vqgan_lc.codebook import Codebook

PLUGIN = "quant_vqgan_lc"


class Coded(NamedTuple):
    """A pass in full: reconstruction, latents and entries (T, d), codes (N, h, w)."""

    image: Tensor
    z: Tensor
    z_q: Tensor
    codes: Tensor


class Tokenizer(nn.Module):
    """Images (N, C, H, W) in [-1, 1] to tokens (N, h, w) and back.

    Args:
        autoencoder: gives `encoder` and `decoder`.
        z_channels: channels between them.
        d: width of the latent that is quantized.
        codebook: of entries of width d.
    """

    def __init__(self, autoencoder: nn.Module, z_channels: int, d: int, codebook: Codebook):
        super().__init__()
        self.encoder: nn.Module = autoencoder.encoder  # type: ignore[assignment]
        self.decoder: nn.Module = autoencoder.decoder  # type: ignore[assignment]
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z_channels, d, 1), nn.Conv2d(d, z_channels, 1)
        self.codebook = codebook
        self.factor: int = getattr(autoencoder, "factor", 1)
        """Pixels of an image's side per token, where the autoencoder says so."""

    def forward(self, image: Tensor, details: bool = False) -> Tensor | Coded:
        """Return the reconstruction, or with `details` all that a training step needs."""
        z = self.quant_conv(self.encoder(image))
        n, d, height, width = z.shape
        found = self.codebook(z.permute(0, 2, 3, 1).reshape(-1, d))
        passed = found.z + (found.z_q - found.z).detach() if torch.is_grad_enabled() else found.z_q
        out = self.decode(passed.reshape(n, height, width, d))
        return Coded(out, found.z, found.z_q, found.codes.view(n, height, width)) if details else out

    def decode(self, z_q: Tensor) -> Tensor:
        """Return images of entries (N, h, w, d)."""
        image: Tensor = self.decoder(self.post_quant_conv(z_q.permute(0, 3, 1, 2)))
        return image

    @torch.no_grad()
    def tokens(self, image: Tensor) -> Tensor:
        """Return the codes (N, h, w), int64, of images."""
        z = self.quant_conv(self.encoder(image)).permute(0, 2, 3, 1)
        codes: Tensor = self.codebook(z.reshape(-1, z.shape[-1])).codes
        return codes.view(z.shape[:-1])

    @torch.no_grad()
    def images(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens (N, h, w)."""
        return self.decode(self.codebook.entries()[tokens])


@torch.no_grad()
def latent_channels(model: nn.Module, image: Tensor) -> int:
    """Return the channels between a model's encoder and decoder.

    Raises:
        UnsupportedModelError: it has not these two modules, they take no images, or make none of their size.
    """
    encoder, decoder = getattr(model, "encoder", None), getattr(model, "decoder", None)
    name = type(model).__name__
    if not isinstance(encoder, nn.Module) or not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(
            f"{PLUGIN}: {name} has no modules 'encoder' and 'decoder'; start from vqgan:small or another autoencoder"
        )
    with eval_mode(model):
        try:
            z = encoder(image)
            again = decoder(z)
        except Exception as error:  # foreign modules raise many types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(
                f"{PLUGIN}: {name} does not take images {tuple(image.shape[1:])}: {reason}"
            ) from error
    if not isinstance(z, Tensor) or z.ndim != 4:
        raise UnsupportedModelError(f"{PLUGIN}: the encoder of {name} gives no latent (N, C, h, w)")
    if not isinstance(again, Tensor) or again.shape != image.shape:
        raise UnsupportedModelError(f"{PLUGIN}: the decoder of {name} gives no images {tuple(image.shape[1:])}")
    return int(z.shape[1])
