"""What is done to each row by itself: norms, rotations, embeddings of patches.

Rows enter; rows leave, float32.
It knows no models.
"""
