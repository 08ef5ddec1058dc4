"""Untrusted files, opened in processes of their own.

Enter: bytes. Leave: pictures, pages and frames through shared memory, or a sentence about what took too long.
Knows who waits, but not for what.
"""
