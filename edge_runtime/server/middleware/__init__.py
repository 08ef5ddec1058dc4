"""Checks of every request before a route sees it: connections, shares, sizes, times, origins, JSON.

ASGI messages and bytes enter; they leave unchanged, or a refusal does.
It knows no models.
"""
