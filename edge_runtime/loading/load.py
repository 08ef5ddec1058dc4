"""A model's files and options → the parts of an engine, in an order that finds mistakes before memory is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.cache.caches import Caches
from edge_runtime.cache.disk import DEFAULT_LIMIT_BYTES
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kv_types import choose_kv_type
from edge_runtime.decoder.options import DEFAULT_CONTEXT, DecoderOptions
from edge_runtime.errors import MessageError, ModelFileError
from edge_runtime.loading.memory_needs import choose_context, estimate_memory
from edge_runtime.loading.tuning import Tuning, remembered_tuning
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.store.find import ModelPaths
from edge_runtime.system.forks import begin_loading
from edge_runtime.vision.arithmetic import check_instruction_set
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.config import decoder_config
from edge_runtime.weights.gguf_file import GGUFFile

logger = logging.getLogger("edge_runtime")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; the fields are those of `Model.load`."""

    exact: bool = False
    n_ctx: int | None = None
    n_threads: int | None = None
    force: bool = False
    kv_type: str | None = None
    low_memory: bool = False
    cache_dir: str | Path | None = None
    cache_limit: int = DEFAULT_LIMIT_BYTES
    needs_cache: bool = True
    """Whether an unusable cache folder is an error; otherwise it is a warning, and nothing is cached on disk."""
    warms_up: bool = False
    """Compute the prefixes that recent chats shared (`cache.shared_prefixes`) once the model is loaded and idle."""
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    tuned: bool = True

    def checked(self) -> LoadOptions:
        """Return these options if every number is in range and every adapter has a name.

        Raises
        ------
        MessageError
            Naming the option that is wrong.
        """
        if not isinstance(self.adapters, Mapping) or not all(isinstance(name, str) for name in self.adapters):
            raise MessageError(f"adapters is {self.adapters!r}; expected a mapping from names to files.")
        for name, what in (
            ("n_ctx", "number of tokens"),
            ("n_threads", "number"),
            ("cache_limit", "number of bytes"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MessageError(f"{name} is {value}; expected a positive {what}.")
        return self


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    encoder: ImageEncoder
    decoder: Decoder
    tokenizer: Tokenizer
    caches: Caches
    n_threads: int
    """Of the vision kernels."""


def load_parts(paths: ModelPaths, options: LoadOptions) -> Parts:
    """Load a model's parts.

    Raises
    ------
    ModelFileError
        When files are damaged or do not belong to one model.
    NotEnoughMemoryError
        When the model needs more than is free; nothing is loaded then.
    MessageError
        When an option does not fit the model, or the cache folder cannot be used.
    EdgeRuntimeError
        In a fork of a process that had loaded a model.
    """
    from edge_kernels.machine import cpu_count, isa

    begin_loading()
    check_instruction_set()
    exact = options.exact
    encoder = ImageEncoder(paths.mmproj, exact=exact)
    file = GGUFFile(paths.decoder)
    config = decoder_config(file)
    found = (remembered_tuning(file) if options.tuned else None) or Tuning()
    repack = found.repack and not options.low_memory
    threads = options.n_threads or cpu_count()
    kv_type = choose_kv_type(file, options.kv_type or (None if exact else found.kv_type), exact=exact)
    n_ctx = choose_context(
        lambda n: estimate_memory(
            file, encoder, n, exact=exact, kv_type=kv_type, repack=repack, low_memory=options.low_memory
        ),
        paths.name,
        options.n_ctx,
        config.context_length,
        force=options.force,
    )
    setup = DecoderOptions(
        n_ctx=n_ctx,
        exact=exact,
        n_threads=options.n_threads or found.n_threads or threads,  # tuned for the decoder alone
        kv_type=kv_type,
        n_ubatch=found.n_ubatch,
        repack=repack,
        adapters=options.adapters,
    )
    decoder = Decoder(file, setup)
    try:
        if decoder.config.hidden != encoder.hidden:
            raise ModelFileError(
                f"{paths.decoder.name} has hidden size {decoder.config.hidden}, but the visual tokens of "
                f"{paths.mmproj.name} have {encoder.hidden}; use the decoder and the mmproj file of the same model."
            )
        tokenizer = Tokenizer(file)
        caches = _caches(options, encoder, decoder, isa())
    except BaseException:
        decoder.close()
        raise
    return Parts(encoder, decoder, tokenizer, caches, threads)


def _caches(options: LoadOptions, encoder: ImageEncoder, decoder: Decoder, isa: str) -> Caches:
    if options.cache_dir is not None:
        try:
            return Caches.in_folder(
                options.cache_dir,
                options.cache_limit,
                encoder,
                decoder,
                exact=options.exact,
                isa=isa,
                low_memory=options.low_memory,
            )
        except MessageError as error:
            if options.needs_cache:
                raise
            logger.warning("%s Computed prompts are not kept on disk.", error)
    return Caches(low_memory=options.low_memory)


def needed_bytes(paths: ModelPaths, options: LoadOptions) -> int:
    """Memory that a model will need with the wanted context, estimated from its files' headers.

    Raises
    ------
    ModelFileError
        When files are damaged.
    """
    file = GGUFFile(paths.decoder)
    encoder = ImageEncoder(paths.mmproj, exact=options.exact)
    n_ctx = min(options.n_ctx or DEFAULT_CONTEXT, decoder_config(file).context_length)
    kv_type, low = options.kv_type, options.low_memory
    return estimate_memory(file, encoder, n_ctx, exact=options.exact, kv_type=kv_type, low_memory=low).total


def set_threads(n_threads: int) -> None:
    """Set numba's thread count; call it on the thread that will run the kernels, since numba keeps it per thread."""
    from edge_kernels.threads import set_threads

    set_threads(n_threads)
