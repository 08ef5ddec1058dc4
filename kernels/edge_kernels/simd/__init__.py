"""Pieces of LLVM IR for one instruction set: tiles, loads, epilogues.

A processor's features enter; code that numba inlines leaves.
It knows no threads and no whole arrays.
"""
