"""The probability margin attack."""

__version__ = "0.1.0"
