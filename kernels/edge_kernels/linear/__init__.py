"""Products of activations with stored weights.

Rows and weights enter; rows leave, float32.
It knows no models.
"""
