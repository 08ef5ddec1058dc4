"""Names that clients use → models and their facts: files, records, blobs, and which are loaded.

A name enters; a loaded model or a description leaves.
It knows nothing of requests' contents.
"""
