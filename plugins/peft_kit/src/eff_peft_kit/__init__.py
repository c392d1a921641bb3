"""What adapter methods share: choice of layers, freezing, files with trained deltas, parameter counts."""

__version__ = "0.1.0"
