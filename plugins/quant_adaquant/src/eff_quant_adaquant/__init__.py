"""AdaQuant: layer-wise calibration, integer programming and statistics tuning."""

__version__ = "0.1.0"
