"""Pictures and texts → what quantisation should keep: importance of weights, ranges of activations.

Files enter; importance matrices and ranges leave.
It knows no tensor types.
"""
