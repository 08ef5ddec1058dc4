"""A loaded model from inside: what it is, its engine, and slices, visual tokens and logits of it.

For comparing with the official code; answers are `Model`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self, Unpack

import numpy as np

from edge_runtime.cache.shared_prefixes import Beginnings
from edge_runtime.decoder.embedding import embed
from edge_runtime.decoder.trace import Trace, trace
from edge_runtime.engine.engine import MAX_REQUESTS, Engine
from edge_runtime.engine.events import Activity
from edge_runtime.inputs.image import ImageSource, load_image
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.inputs.slicing import Slice, check_plan, plan_slices, slice_image
from edge_runtime.inputs.workers.opener import opening
from edge_runtime.loading.capabilities import capabilities
from edge_runtime.loading.load import LoadOptions, load_parts, set_threads
from edge_runtime.option_checks import ModelLimits, checked_prompt_options
from edge_runtime.options import PreparationHooks, PromptKeywords, PromptOptions
from edge_runtime.pipeline import InputFormat, Prepared, pack_frames, prepare
from edge_runtime.prompt.build import Prompt
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.store.find import ModelPaths
from edge_runtime.weights.config import is_toy
from edge_runtime.weights.gguf_file import Float32


class LoadedModel:
    """The part of `Model` that tells of itself; everything that computes runs on the inference thread."""

    is_remote = False
    """Whether another server computes its answers."""

    def __init__(self, paths: ModelPaths, options: LoadOptions) -> None:
        started = time.perf_counter()
        self.paths, self.exact = paths, options.exact
        parts = load_parts(paths, options)
        self._low_memory = parts.low_memory
        self._encoder, self._decoder, self.tokenizer = parts.encoder, parts.decoder, parts.tokenizer
        self.template = self._decoder.file.get("tokenizer.chat_template", str, OFFICIAL_CHAT_TEMPLATE)
        """The chat template (Jinja)."""
        self.is_toy = is_toy(self._decoder.file)
        """Whether its file says that its answers are not to be believed, as the demo's does."""
        self._engine = Engine(self._encoder, self._decoder, self.tokenizer, parts.caches)
        self._beginnings = Beginnings()
        self._engine.run(lambda: set_threads(parts.n_threads))
        if options.warms_up:
            self.warm_up()
        self.load_s = time.perf_counter() - started
        """Seconds that loading took."""

    @property
    def name(self) -> str:
        """What the model was called when it was loaded."""
        return self.paths.name

    @property
    def engine(self) -> Engine:
        """What computes: a thread, and the encoder, decoder, scheduler and caches that it owns.

        For tests and measurements: its names are not stable. What touches them runs on its thread, by `Engine.run`.
        """
        return self._engine

    def check_usable(self) -> None:
        """Refuse what would wait for ever, or be computed with something else than what was loaded.

        Raises
        ------
        EdgeRuntimeError
            When the model was closed, or loaded by the process that this one was forked from.
        ModelFileError
            When its files were written to since.
        """
        self._engine.check_open()
        for file in (self._decoder.file, self._encoder.file):
            file.check_unchanged()

    @property
    def capabilities(self) -> list[str]:
        """What it can do, by Ollama's names: completion, vision, tools, thinking."""
        return capabilities(self._decoder.file)

    @property
    def uses_amx_prefill(self) -> bool:
        """Whether prompts are computed by our kernels, which must be compiled once on a machine."""
        return self._decoder.uses_amx_prefill

    @property
    def n_ctx(self) -> int:
        """Context length in tokens."""
        return self._decoder.n_ctx

    @property
    def n_queries(self) -> int:
        """Visual tokens of one slice."""
        return self._encoder.n_queries

    @property
    def activity(self) -> Activity:
        """How many requests wait and run now, of how many at most, and how often a picture was known already."""
        return self._engine.activity

    @property
    def limits(self) -> ModelLimits:
        """What options of a request are held against."""
        return ModelLimits(
            n_logits=self._decoder.config.vocabulary,
            n_tokens=len(self.tokenizer.tokens),
            stop_ids=self.tokenizer.stop_ids,
            max_beams=self._decoder.n_sequences,
            max_answers=MAX_REQUESTS,
        )

    @property
    def input_format(self) -> InputFormat:
        """What its prompts look like."""
        return InputFormat(
            self._encoder.slicing, self.tokenizer, self._encoder.n_queries, self.template, self._decoder.n_ctx
        )

    def prepare(self, messages: str | Sequence[Any], **options: Unpack[PromptKeywords]) -> Prepared:
        """A conversation ready for the engine, without computing anything; see `pipeline.prepare`."""
        asked, hooks = PromptOptions.of(options)
        return self._prepare(messages, checked_prompt_options(asked, self.limits), hooks)

    def _prepare(
        self,
        messages: str | Sequence[Any],
        options: PromptOptions,
        hooks: PreparationHooks,
        reserve_tokens: int = 1,
        refuse: bool = False,
    ) -> Prepared:
        with opening(hooks.decoders, hooks.on_check) as opener:
            return prepare(
                messages,
                options,
                self.input_format,
                reserve_tokens=reserve_tokens,
                refuse=refuse,
                beginnings=self._beginnings if refuse else None,
                hooks=hooks,
                opener=opener,
            )

    def slices(self, image: ImageSource, max_slices: int | None = None) -> list[Slice]:
        """Slices of a picture as the vision tower gets them."""
        picture, slicing = load_image(image), self._encoder.slicing
        plan = plan_slices(*picture.size, slicing, max_slices)
        check_plan(*picture.size, plan, slicing)
        return slice_image(picture, plan, slicing)

    def encode_image(self, image: ImageSource, max_slices: int | None = None) -> list[Float32]:
        """Visual tokens of a picture: one ndarray [shape=(queries, hidden), float32] per slice."""
        return self.encode_video([image], [[-1]], max_slices)

    def encode_video(
        self, frames: Sequence[ImageSource], temporal_ids: Sequence[Sequence[int]], max_slices: int | None = 1
    ) -> list[Float32]:
        """Visual tokens of packed video frames.

        Parameters
        ----------
        frames : pictures of one size.
        temporal_ids : times in units of 0.1 s, cut into the groups that share queries.

        Returns
        -------
        tokens : one ndarray [shape=(queries, hidden), float32] per group, slice after slice inside a group of frames.
        """
        left = iter(frames)
        frame_slices = ([self.slices(next(left), max_slices) for _ in ids] for ids in temporal_ids)
        groups = [
            group for ids, cut in zip(temporal_ids, frame_slices, strict=True) for group in pack_frames(cut, ids)
        ]
        return self._engine.run(lambda: self.encode_groups(groups))

    def vision_features(self, image: ImageSource, max_slices: int | None = None) -> list[Float32]:
        """Output of the vision tower, before the resampler: one ndarray [shape=(P, width), float32] per slice."""
        slices = self.slices(image, max_slices)
        return self._engine.run(lambda: [self._encoder.tower.encode([item])[0] for item in slices])

    def build_prompt(self, messages: str | Sequence[Any], **options: Unpack[PromptKeywords]) -> Prompt:
        """Text, token ids and places of the visual tokens of a conversation, without computing anything.

        Parameters
        ----------
        messages : as of `Model.chat`.
        options : those that decide the prompt, see `PromptOptions`; documented in `GenerationOptions`.
        """
        return self.prepare(messages, **options).prompt

    def trace(
        self,
        messages: str | Sequence[Any],
        n_tokens: int,
        *,
        adapter: str | None = None,
        **options: Unpack[PromptKeywords],
    ) -> Trace:
        """Logits after the prompt and the `n_tokens` most probable tokens; for comparing with the official code.

        Parameters
        ----------
        messages, options : as of `build_prompt`.
        adapter : name of a LoRA adapter the model was loaded with.
        """
        prepared = self.prepare(messages, **options)
        return self._engine.run(lambda: trace(self._decoder, self.embeddings(prepared), n_tokens, adapter))

    def embeddings(self, prepared: Prepared) -> Float32:
        """What enters the decoder: ndarray [shape=(n, hidden), float32]; on the engine's thread."""
        places = dict(zip(prepared.prompt.bounds, self.encode_groups(prepared.groups), strict=True))
        return embed(self._decoder, np.asarray(prepared.prompt.ids, np.int64), places)

    def encode_groups(self, groups: Sequence[Group]) -> list[Float32]:
        """Visual tokens of prepared groups of slices, in order; on the engine's thread."""
        if self._low_memory:
            self._decoder.release_pages()
        tokens = self._encoder.encode(groups)
        if self._low_memory:
            self._encoder.unload()
        return tokens

    def warm_up(self) -> None:
        """Compute what chats shared when this model was last loaded (system prompt and tools) while nobody asks.

        Returns at once. Of use with a `cache_dir`, which has it written down: the first chat then begins with its
        own words. Whoever asks meanwhile interrupts it.
        """
        self._engine.warm_up()

    def close(self) -> None:
        """Free the memory; further calls raise."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
