"""The kernels as a backend of ggml: llama.cpp hands them its products with weights in blocks, where they lie.

What enters: nothing but a ggml that is loaded. What leaves: `register.register`, and which contexts use it. It knows
nothing of models or of llama.cpp: any program that imports llama_cpp becomes faster by

    from edge_kernels.ggml_backend.register import register
    register()
"""
