"""Checkpoints as they lie on a disk → tensors in the official layout.

A folder enters; names, shapes and rows of float32 leave.
It knows no GGUF.
"""
