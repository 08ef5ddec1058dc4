"""What the operating system offers: atomic files, sandboxes, forks, shared memory, addresses.

Enter: paths, bytes and processes. Leave: the same, or an error that says why not.
Knows neither models nor requests.
"""
