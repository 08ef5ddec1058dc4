"""Whatever clients send → slices the vision tower can take.

Messages, pictures, documents and videos enter; upright RGB pictures, slices and groups of them leave.
It knows no tokens, no kernels and no llama.cpp.
"""
