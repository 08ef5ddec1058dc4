"""Checkpoints on disk → tensors in the official layout.

A folder enters; names, shapes and float32 rows leave.
It knows no GGUF.
"""
