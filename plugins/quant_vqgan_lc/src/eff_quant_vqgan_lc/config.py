"""Options of quant_vqgan_lc. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

Variant = Literal["frozen_features", "tuned_features", "random_tuned", "random_fixed", "ema", "factorized"]
FEATURES = "zoo:efficientnet_lite0?pretrained=true"


class VQGANLCConfig(MethodConfig):
    """Options of quant_vqgan_lc; the defaults are those of the reference code, but for CLIP and LPIPS."""

    n_codes: int = Field(100_000, ge=2, description="Entries of the codebook, N.")
    code_dim: int = Field(8, ge=1, le=1024, description="Width d of the latent and of the projected entries.")
    codebook: Variant = Field("frozen_features", description="The method, or one of the codebooks it is compared with.")
    projector: Literal["linear", "mlp", "none"] = Field(
        "linear", description="From feature tables to d; none: their first d principal components. Others have none."
    )
    start: Literal["matched", "drawn"] = Field(
        "matched",
        description="Entries begin with the latents' mean and spread, or as they are drawn (paper, on CLIP's features).",
    )
    table: str = Field(
        "per_class",
        description="per_class, kmeans or random features; or a .npy, .npz, .safetensors or .pt file (rows, width).",
    )
    centres_per_class: int = Field(100, ge=1, description="Rows per class of table=per_class.")
    kmeans_iters: int = Field(50, ge=1, description="Rounds of k-means, at most.")
    features: str = Field(FEATURES, description="The frozen network, any model source, that makes table and losses.")
    feature_layer: str = Field("_blocks.10", description="Its module whose output is the map of patch features.")
    feature_size: int | None = Field(
        256, ge=8, description="Side to which images are resized for it; unset: as they are."
    )
    pool: int = Field(4, ge=1, description="Side of the squares of patch features averaged before k-means.")
    w_encoder: float = Field(1.0, ge=0, description="Weight of the term that pulls the encoder to the entries.")
    w_codebook: float = Field(
        0.33, ge=0, description="Weight of the term that pulls projector or entries to the latents."
    )
    rate_q: float = Field(0.1, ge=0, description="Weight of both terms.")
    rate_p: float = Field(1.0, ge=0, description="Weight of the perceptual loss; 0: none.")
    rate_d: float = Field(0.1, ge=0, description="Weight of the GAN loss before its adaptive weight; 0: none.")
    disc_start: int = Field(10_000, ge=0, description="Steps before the discriminator takes part.")
    disc_width: int = Field(64, ge=4, description="Channels of the discriminator's first layer.")
    perceptual: str | None = Field(None, description="Network of the perceptual loss; unset: features.")
    perceptual_layers: tuple[str, ...] = Field(
        ("_blocks.2", "_blocks.4", "_blocks.10"), min_length=1, description="Its modules whose outputs are compared."
    )
    lr: float = Field(5e-4, gt=0, description="Learning rate of both Adams, after warm-up.")
    betas: tuple[float, float] = Field((0.5, 0.9), description="Of both Adams.")
    epochs: int = Field(100, ge=0, description="Passes over the images; a twentieth of them is warm-up.")
    batch: int = Field(256, ge=1, description="Images of a batch.")
    ema_decay: float = Field(0.99, gt=0, lt=1, description="Of codebook=ema.")
    chunk: int = Field(8192, ge=1, description="Entries of one block of distances.")

    @property
    def from_features(self) -> bool:
        """Whether the codebook is made of features."""
        return self.codebook in ("frozen_features", "tuned_features")

    @model_validator(mode="after")
    def _fits(self) -> VQGANLCConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas[0]:g} and {self.betas[1]:g}")
        return self
