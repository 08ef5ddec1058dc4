"""Logits → a token → text.

Takes logits; returns token ids, log probabilities and pieces of text. Knows one answer, none of the others.
"""
