"""CoDeNet: object detection with hardware-friendly deformable convolution, 4-bit weights and 8-bit activations."""

__version__ = "0.1.0"
