"""FLIQS: one-shot search for number formats."""

__version__ = "0.1.0"
