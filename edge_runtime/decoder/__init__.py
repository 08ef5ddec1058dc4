"""Embeddings → logits: the Qwen3 decoder in llama.cpp, and one KV cache.

Takes rows of embeddings and their sequences; returns rows of logits. Knows nothing of text and pictures.
"""
