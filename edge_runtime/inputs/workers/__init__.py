"""Foreign files, opened in processes of their own.

Bytes enter; pictures, pages and frames leave through shared memory, or a sentence about what took too long.
It knows who waits, not what for.
"""
