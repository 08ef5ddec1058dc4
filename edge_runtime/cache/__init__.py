"""What outlives a request: visual tokens and prefixes of conversations, in memory and on disk.

Digests enter; what was computed before leaves, or nothing.
It knows no requests.
"""
