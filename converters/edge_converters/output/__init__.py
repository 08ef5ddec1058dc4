"""Planned tensors → GGUF files, verified and reported.

A plan enters; whole files leave, or none.
It knows no checkpoints beyond their plan.
"""
