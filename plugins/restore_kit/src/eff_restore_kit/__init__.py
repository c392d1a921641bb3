"""What image restoration methods share: data, degradations, metrics, tiling."""

__version__ = "0.1.0"
