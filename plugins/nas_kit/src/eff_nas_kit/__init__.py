"""What architecture search methods share: search spaces, supernets, samplers, genotypes."""

__version__ = "0.1.0"
