"""Whatever clients send → slices that the vision tower takes.

Enter: messages, pictures, documents and videos. Leave: upright RGB pictures, slices and groups of slices.
Knows no tokens, no kernels and no llama.cpp.
"""
