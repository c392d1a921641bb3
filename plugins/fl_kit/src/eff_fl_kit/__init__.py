"""What federated methods share: partitions, client sampling, the client/server protocol, in process and on Flower."""

__version__ = "0.1.0"
