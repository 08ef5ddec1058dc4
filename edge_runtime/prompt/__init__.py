"""Messages and the shapes of their pictures → prompt text and token ids that fit the context.

Messages enter; ids and the places of visual tokens leave.
It knows no pixels, no kernels and no llama.cpp.
"""
