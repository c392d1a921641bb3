"""PaCA: fine-tuning some input columns of each linear layer in place."""

__version__ = "0.1.0"
