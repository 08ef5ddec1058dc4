"""Messages and the shapes of their pictures → prompt text and token ids that fit the context.

Enter: messages. Leave: token ids and the places of visual tokens.
Knows no pixels, no kernels and no llama.cpp.
"""
