"""VQGAN-LC: image tokenizers with a large codebook of projected frozen features."""

__version__ = "0.1.0"
