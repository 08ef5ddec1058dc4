"""Planned tensors → GGUF files, verified and reported.

A plan enters; complete files leave, or none.
It knows of a checkpoint only the plan.
"""
