"""Names → files on this machine.

A name enters; paths leave, after a pull if one is needed.
It knows nothing of tensors beyond a file's header.
"""
