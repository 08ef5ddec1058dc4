"""A model's files and options → the parts of an engine, in an order that finds mistakes before memory is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.cache.caches import Caches
from edge_runtime.cache.disk import DEFAULT_LIMIT_BYTES
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kv_types import choose_kv_type, low_kv_type
from edge_runtime.decoder.options import LOW_MEMORY_UBATCH, DecoderOptions
from edge_runtime.errors import MessageError, ModelFileError
from edge_runtime.loading.memory_needs import EMBEDDINGS, Needs, estimate_memory, unread_bytes
from edge_runtime.loading.memory_plan import Setup, Wishes, choose_setup
from edge_runtime.loading.tuning import Tuning, remembered_tuning
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.store.find import ModelPaths
from edge_runtime.system.forks import begin_loading
from edge_runtime.vision.arithmetic import check_instruction_set
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.config import decoder_config
from edge_runtime.weights.gguf_file import GGUFFile
from edge_runtime.weights.mixes import MIXES, mixed_bytes

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
    low_memory: bool
    """Whether vision part and decoder take turns in memory: asked for, or chosen because memory is short."""


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
    from edge_kernels.machine import isa

    begin_loading()
    check_instruction_set()
    encoder = ImageEncoder(paths.mmproj, exact=options.exact)
    file = GGUFFile(paths.decoder)
    found = (remembered_tuning(file) if options.tuned else None) or Tuning()
    threads = _threads(options.n_threads)

    setup = choose_setup(
        lambda setup: _needs(file, encoder, setup, options, found),
        paths.name,
        _wishes(file, options, found),
        force=options.force,
        other_types=_smaller_types(file),
    )
    encoder.low_memory = low = setup.low_memory
    decoder = Decoder(file, _decoder_options(options, found, setup, threads))
    try:
        if decoder.config.hidden != encoder.hidden:
            raise ModelFileError(
                f"{paths.decoder.name} has hidden size {decoder.config.hidden}, but the visual tokens of "
                f"{paths.mmproj.name} have {encoder.hidden}; use the decoder and the mmproj file of the same model."
            )
        tokenizer = Tokenizer(file)
        caches = _caches(options, encoder, decoder, isa(), low_memory=low)
    except BaseException:
        decoder.close()
        raise
    return Parts(encoder, decoder, tokenizer, caches, threads, low)


def _threads(asked: int | None) -> int:
    """Threads to compute with; more than processors would only wait for each other, so a line in the log tells."""
    from edge_kernels.machine import cpu_count

    if asked is None:
        return cpu_count()
    from edge_kernels.threads import thread_limit  # takes time to import

    most = thread_limit()
    if asked > most:
        logger.warning(
            "%d threads were asked for, but no more than %d can compute at once here: %d run.", asked, most, most
        )
    return min(asked, most)


def _decoder_options(options: LoadOptions, found: Tuning, setup: Setup, threads: int) -> DecoderOptions:
    low = setup.low_memory
    return DecoderOptions(
        n_ctx=setup.n_ctx,
        exact=options.exact,
        n_threads=threads if options.n_threads else found.n_threads or threads,  # tuned for the decoder alone
        kv_type=setup.kv_type,
        n_ubatch=min(found.n_ubatch, LOW_MEMORY_UBATCH) if low else found.n_ubatch,
        repack=found.repack and not low,
        adapters=options.adapters,
    )


def _wishes(file: GGUFFile, options: LoadOptions, found: Tuning) -> Wishes:
    """What was asked for, or found by tuning; raises what `choose_kv_type` does."""
    exact, longest = options.exact, decoder_config(file).context_length
    asked = options.kv_type or (None if exact else found.kv_type)
    kv_type, least = choose_kv_type(file, asked, exact=exact), low_kv_type(file, exact=exact)
    low = kv_type if asked else least
    return Wishes(longest, kv_type, low, least, options.n_ctx, options.low_memory)


def _needs(file: GGUFFile, encoder: ImageEncoder, setup: Setup, options: LoadOptions, found: Tuning) -> Needs:
    return estimate_memory(
        file,
        encoder,
        setup.n_ctx,
        exact=options.exact,
        kv_type=setup.kv_type,
        repack=found.repack and not setup.low_memory,
        low_memory=setup.low_memory,
    )


def _smaller_types(file: GGUFFile) -> list[tuple[str, int]]:
    """Types in which the decoder would be smaller, with the bytes that they hold in memory, the largest first."""
    without = (EMBEDDINGS,) if unread_bytes(file) else ()
    held = sum(info.n_bytes for info in file.tensors.values() if info.name not in without)  # not its metadata
    sizes = [(mix, mixed_bytes(file, mix, without)) for mix in MIXES]
    return sorted((each for each in sizes if each[1] < held), key=lambda each: -each[1])


def _caches(options: LoadOptions, encoder: ImageEncoder, decoder: Decoder, isa: str, *, low_memory: bool) -> Caches:
    if options.cache_dir is not None:
        try:
            return Caches.in_folder(
                options.cache_dir,
                options.cache_limit,
                encoder,
                decoder,
                exact=options.exact,
                isa=isa,
                low_memory=low_memory,
            )
        except MessageError as error:
            if options.needs_cache:
                raise
            logger.warning("%s Computed prompts are not kept on disk.", error)
    return Caches(low_memory=low_memory)


def needed_bytes(paths: ModelPaths, options: LoadOptions) -> int:
    """Memory that a model will need with what is preferred for it, estimated from its files' headers.

    Raises
    ------
    ModelFileError
        When files are damaged.
    MessageError
        When the KV type does not fit the model.
    """
    file = GGUFFile(paths.decoder)
    encoder = ImageEncoder(paths.mmproj, exact=options.exact)
    setup = _wishes(file, options, Tuning()).setups()[0]
    return _needs(file, encoder, setup, options, Tuning()).total


def set_threads(n_threads: int) -> None:
    """Set numba's thread count; call it on the thread that will run the kernels, since numba keeps it per thread."""
    from edge_kernels.threads import set_threads

    set_threads(n_threads)
