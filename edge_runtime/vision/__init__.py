"""Slices → visual tokens: the SigLIP2 tower and the 3D resampler.

Normalised patches and their grid enter; visual tokens leave, float32 (S, Q, E).
It knows no decoder.
"""
