"""OpenAI's APIs (chat, completions, responses) and llama-server's own beside them.

JSON bodies enter; JSON and events leave.
It knows none of the other protocols.
"""
