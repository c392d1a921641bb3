"""VQ4DiT: vector quantization of diffusion transformers."""

__version__ = "0.1.0"
