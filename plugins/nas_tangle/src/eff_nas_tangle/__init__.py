"""TangleNAS: gradient-based architecture search on entangled weights."""

__version__ = "0.1.0"
