"""The definition of every kernel in NumPy, plain and slow.

Arrays enter; arrays leave.
It knows no instruction sets.
"""
