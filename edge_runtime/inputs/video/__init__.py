"""Videos → frames.

Enter: a file, a folder or pictures. Leave: chosen frames, upright and in RGB.
Knows no messages and no prompts.
"""
