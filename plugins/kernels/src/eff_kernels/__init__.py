"""Shared kernels of eff: one op is one package with a reference, a Triton kernel and a registration."""

__version__ = "0.1.0"
