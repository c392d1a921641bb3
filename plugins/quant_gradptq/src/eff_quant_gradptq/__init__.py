"""Gradient-based post-training quantization: learned rounding."""

__version__ = "0.1.0"
