"""HAWQ-V3: networks that run on integers alone."""

__version__ = "0.1.0"
