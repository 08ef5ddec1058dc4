"""Pictures and texts → what quantisation should keep: importance of weights, ranges of activations.

Files enter; matrices of importance and ranges leave.
It knows no types of tensors.
"""
