"""What quantization methods share."""

__version__ = "0.1.0"
