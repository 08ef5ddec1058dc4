"""What outlives a request: visual tokens and prefixes of conversations, in memory and on disk.

Takes digests; returns what was computed before, or nothing. Knows nothing of requests.
"""
