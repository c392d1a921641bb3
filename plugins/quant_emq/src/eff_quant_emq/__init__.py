"""EMQ: evolving training-free proxies for mixed precision."""

__version__ = "0.1.0"
