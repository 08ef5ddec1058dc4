"""Operations on each row by itself: norms, rotations, patch embeddings.

Rows enter; rows leave, float32.
It knows no models.
"""
