"""GGUF files → arrays, numbers and an identity.

Enters: a path. Leaves: float32 arrays, stored blocks, a checked configuration, digests.
Knows neither pictures nor prompts.
"""
