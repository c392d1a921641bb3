"""Analysis of trained convolution filters (CNN Filter DB), for eff."""

__version__ = "0.1.0"
