"""Names that clients use → models, and what is known of them: files, records, blobs, and which are loaded.

A name enters; a loaded model or a description leaves.
It knows no request's content.
"""
