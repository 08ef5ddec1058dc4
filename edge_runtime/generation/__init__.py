"""Logits → a token → text.

Logits enter; token ids, log probabilities and pieces of text leave.
It knows one answer, not its neighbours.
"""
