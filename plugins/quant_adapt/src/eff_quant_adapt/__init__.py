"""AdaPT: adaptive-precision fixed-point training."""

__version__ = "0.1.0"
