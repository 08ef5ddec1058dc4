"""Which decoders our kernels multiply for inside llama.cpp, and contexts made with them.

llama.cpp goes on doing all the rest: it hands over every product of rows with quantised weights, in prompts and in
generation, whatever the KV cache and the adapter (`edge_kernels.ggml_backend`). On any doubt it computes alone, and
one line says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.errors import BackendUnavailable
from edge_runtime.weights.gguf_file import GGUFFile

logger = logging.getLogger("edge_runtime")

VARIABLE = "EDGE_RUNTIME_KERNELS"
COMPILED = "ggml_backend.compiled"
"""The module of `edge_kernels` that llama.cpp calls."""
MIN_FILE_BYTES = 1 << 28
"""Minimum size of a decoder file; with smaller ones there is nothing to gain."""


def kernel_setting() -> bool | None:
    """What EDGE_RUNTIME_KERNELS says: True for "on", False for "off", None where it is not set.

    Raises
    ------
    BackendUnavailable
        When it says anything else.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "on", "off"):
        raise BackendUnavailable(f"{VARIABLE} is {value!r}; set it to on or off, or not at all.")
    return {"": None, "on": True, "off": False}[value]


def wants_kernels(file: GGUFFile, options: DecoderOptions) -> bool:
    """Whether a context of these options should use our kernels.

    `exact` wants llama.cpp's own arithmetic, and repacked weights are in an order of llama.cpp's.
    """
    if options.exact or options.repack:
        return False
    setting = kernel_setting()
    if setting is False:
        return False
    wanted = setting if options.kernels is None else options.kernels
    return file.path.stat().st_size >= MIN_FILE_BYTES if wanted is None else wanted


@contextlib.contextmanager
def new_context(*, with_kernels: bool) -> Iterator[bool]:
    """Make contexts of llama.cpp inside this block, with our kernels or without; yields whether they have them."""
    if not with_kernels and "edge_kernels.ggml_backend.register" not in sys.modules:
        yield False  # nobody can have registered them
        return
    from edge_kernels.compile import is_compiled
    from edge_kernels.ggml_backend import register
    from edge_kernels.ggml_backend.library import BackendError

    if with_kernels and not is_compiled(COMPILED):
        logger.warning("First start on this machine: compiling the decoder's kernels, 30 to 90 seconds.")
    try:
        if with_kernels:
            register.register(claims_weights=False)  # `load_model` repacks nothing that we multiply
    except BackendError as error:
        logger.warning("llama.cpp computes without our kernels: %s", error)
        with_kernels = False
    with register.used_in_new_contexts(with_kernels):
        yield with_kernels
