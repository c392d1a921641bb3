"""Learned step size quantization."""

__version__ = "0.1.0"
