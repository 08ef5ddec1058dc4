"""What a model is, and what goes on inside: slices, visual tokens, logits, for comparing with the official code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_runtime.cache.shared_prefixes import Beginnings
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.embedding import embed
from edge_runtime.decoder.trace import Trace, trace
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.events import Activity
from edge_runtime.inputs.image import ImageSource, load_image
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.inputs.slicing import Slice, check_plan, plan_slices, slice_image
from edge_runtime.inputs.workers.opener import opening
from edge_runtime.inputs.workers.pool import Decoders
from edge_runtime.loading.capabilities import capabilities
from edge_runtime.pipeline import Prepared, PromptOptions, pack_frames, prepare
from edge_runtime.prompt.build import Prompt
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.gguf_file import Float32


class Inside:
    """The part of `Model` that tells of itself; everything that computes runs on the inference thread."""

    _encoder: ImageEncoder
    _decoder: Decoder
    _engine: Engine
    _beginnings: Beginnings
    _low_memory: bool
    tokenizer: Tokenizer
    template: str

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
    def engine(self) -> Engine:
        """The engine, for tests and benchmarks that look inside; not stable."""
        return self._engine

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

    def _prepare(
        self,
        messages: str | Sequence[Any],
        on_image: Callable[[int, int], None] = lambda done, total: None,
        on_look: Callable[[float], None] = lambda share: None,
        on_check: Callable[[], None] = lambda: None,
        decoders: Decoders | None = None,
        room: int = 1,
        refuse: bool = False,
        **options: Any,
    ) -> Prepared:
        with opening(decoders, on_check) as opener:
            return prepare(
                messages,
                PromptOptions.of(options),
                slicing=self._encoder.slicing,
                tokenizer=self.tokenizer,
                n_queries=self._encoder.n_queries,
                template=self.template,
                n_ctx=self.n_ctx,
                room=room,
                refuse=refuse,
                beginnings=self._beginnings if refuse else None,
                on_image=on_image,
                on_look=on_look,
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
        return self._engine.call(lambda: self._encode(groups))

    def vision_features(self, image: ImageSource, max_slices: int | None = None) -> list[Float32]:
        """Output of the vision tower, before the resampler: one ndarray [shape=(P, width), float32] per slice."""
        slices = self.slices(image, max_slices)
        return self._engine.call(lambda: [self._encoder.tower.encode([item])[0] for item in slices])

    def build_prompt(self, messages: str | Sequence[Any], **prompt_options: Any) -> Prompt:
        """Text, token ids and places of the visual tokens of a conversation, without computing anything."""
        return self._prepare(messages, **prompt_options).prompt

    def trace(
        self, messages: str | Sequence[Any], n_tokens: int, *, adapter: str | None = None, **prompt_options: Any
    ) -> Trace:
        """Logits after the prompt and the `n_tokens` most probable tokens; for comparing with the official code."""
        prepared = self._prepare(messages, **prompt_options)
        return self._engine.call(lambda: trace(self._decoder, self._embeddings(prepared), n_tokens, adapter))

    def _encode(self, groups: Sequence[Group]) -> list[Float32]:
        tokens = self._encoder.encode(groups)
        if self._low_memory:
            self._encoder.unload()
        return tokens

    def _embeddings(self, prepared: Prepared) -> Float32:
        places = dict(zip(prepared.prompt.bounds, self._encode(prepared.groups), strict=True))
        return embed(self._decoder, np.asarray(prepared.prompt.ids, np.int64), places)
