"""Files and options → an engine that fits the memory.

Paths and options enter; a loaded engine and what can be told of it leave, or a sentence that says what does not fit.
It knows no requests.
"""
