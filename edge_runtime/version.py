"""The version of the three packages; what is computed is kept under it."""

__version__ = "0.1.0"
