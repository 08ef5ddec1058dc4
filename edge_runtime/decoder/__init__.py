"""Embeddings → logits: the Qwen3 decoder in llama.cpp, and one KV cache.

Rows of embeddings and their sequences enter; rows of logits leave.
It knows no text and no pictures.
"""
