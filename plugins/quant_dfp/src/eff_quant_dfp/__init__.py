"""Mixed precision training with dynamic fixed point."""

__version__ = "0.1.0"
