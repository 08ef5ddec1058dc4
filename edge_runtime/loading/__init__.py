"""Files and options → an engine that fits the memory.

Paths and options enter; a loaded engine leaves, or a sentence that says what does not fit.
It knows no requests.
"""
