"""Ollama's API.

JSON bodies enter; JSON and lines of it leave.
It knows none of the other protocols.
"""
