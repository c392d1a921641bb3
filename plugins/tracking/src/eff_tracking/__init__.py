"""Follow the runs of eff in TensorBoard or MLflow."""

__version__ = "0.1.0"
