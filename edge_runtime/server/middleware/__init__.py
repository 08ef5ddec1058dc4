"""What every request passes before a route sees it: connections, shares, sizes, times, origins, JSON.

ASGI messages and bytes enter; the same leave, or a refusal.
It knows no models.
"""
