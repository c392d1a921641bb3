"""Gradient-adaptive quantization-aware training."""

__version__ = "0.1.0"
