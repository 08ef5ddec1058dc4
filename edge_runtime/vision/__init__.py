"""Slices → visual tokens: the SigLIP2 tower and the 3D resampler.

Takes normalised patches and their grid; returns visual tokens, float32 (S, Q, E). Knows nothing of a decoder.
"""
