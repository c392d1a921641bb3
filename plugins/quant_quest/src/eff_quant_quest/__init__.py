"""QuEST: low-bit diffusion models by selective finetuning."""

__version__ = "0.1.0"
