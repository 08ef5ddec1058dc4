"""Attention of queries to keys and values.

Rows enter; rows leave, float32.
It knows no models.
"""
