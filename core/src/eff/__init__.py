"""eff: published methods for efficient, robust and restored deep learning, as commands that run."""

__version__ = "0.1.0"
