"""What adversarial attacks and defences share."""

__version__ = "0.1.0"
