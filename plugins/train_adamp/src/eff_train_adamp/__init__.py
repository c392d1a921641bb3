"""AdamP and SGDP, optimizers for networks with normalisation."""

__version__ = "0.1.0"
