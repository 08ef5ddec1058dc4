"""The one inference thread: many requests, one decoder.

Requests enter through a queue; events leave through iterators. Knows nothing of files and clients.
"""
