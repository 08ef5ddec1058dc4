"""Names → files on this machine.

A name enters; paths leave, after a pull where it is needed.
It knows no tensors beyond a file's header.
"""
