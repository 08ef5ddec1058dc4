"""GGUF files → arrays, numbers and an identity.

A path enters; float32 arrays, stored blocks, a checked configuration and digests leave.
It knows neither pictures nor prompts.
"""
