"""Small reference models for eff, from the architectures' papers."""

__version__ = "0.1.0"
