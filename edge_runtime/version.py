"""The version of the three packages; cached results are stored under it."""

__version__ = "0.1.0"
