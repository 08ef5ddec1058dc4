"""OpenAI's APIs (chat, completions, responses), and llama-server's own routes.

JSON bodies enter; JSON and events leave.
It knows none of the other protocols.
"""
