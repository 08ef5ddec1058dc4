"""A model and this installation → one file that installs and answers on a machine without network and compiler.

What enters: the name of a model, a target and, where they are wanted, wheels. What leaves: a tar file with wheels,
model, checksums, licences and an install script, which runs where this package is not installed yet.
It knows neither prompts nor engines; kernels are compiled by whoever calls.
"""
