"""Adapters whose weights take 1, 2 or 4 bits."""

__version__ = "0.1.0"
