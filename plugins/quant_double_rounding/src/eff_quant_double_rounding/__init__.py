"""Double Rounding: one model for several bit widths."""

__version__ = "0.1.0"
