"""Vector quantization of weights in a learned low-rank space."""

__version__ = "0.1.0"
