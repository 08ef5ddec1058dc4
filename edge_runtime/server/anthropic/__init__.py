"""Anthropic's Messages API.

JSON bodies enter; JSON and events leave.
It knows none of the other protocols.
"""
