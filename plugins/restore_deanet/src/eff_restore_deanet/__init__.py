"""DEA-Net: dehazing with detail-enhanced convolution and content-guided attention."""

__version__ = "0.1.0"
