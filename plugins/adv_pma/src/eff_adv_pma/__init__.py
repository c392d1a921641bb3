"""PMA: attacks on the probability margin."""

__version__ = "0.1.0"
