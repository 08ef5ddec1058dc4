"""What the operating system offers: files that appear whole, sandboxes, forks, shared memory, addresses.

Paths, bytes and processes enter; the same leave, or an error that says why not.
It knows no models and no requests.
"""
