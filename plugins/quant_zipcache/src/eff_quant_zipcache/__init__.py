"""ZipCache: the key/value cache of a language model in 4 and 2 bits, more bits for salient tokens."""

__version__ = "0.1.0"
