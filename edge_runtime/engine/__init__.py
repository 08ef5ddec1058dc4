"""The one inference thread: many requests, one decoder.

Requests enter through a queue; events leave through iterators.
It knows no files and no clients.
"""
