"""Videos → frames.

A file, a folder or pictures enter; chosen frames leave, upright and in RGB.
It knows no messages and no prompts.
"""
