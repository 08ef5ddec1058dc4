"""What will be written: which tensor under which name, in which type.

A checkpoint's tensors and the wanted types enter; planned tensors leave, none computed yet.
It knows no output files.
"""
