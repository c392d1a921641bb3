"""FedSpeed: federated training with a prox-correction and gradients at an ascent point."""

__version__ = "0.1.0"
