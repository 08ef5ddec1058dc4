"""`Model`: the public face, thin over `pipeline` (what goes in) and `engine` (what comes out)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from edge_runtime.answers import Answer, AnswerStream, AsyncAnswer
from edge_runtime.config import decoder_config
from edge_runtime.decoder import Decoder, DecoderOptions
from edge_runtime.encoder import ImageEncoder
from edge_runtime.engine import Engine
from edge_runtime.errors import MessageError, ModelFileError
from edge_runtime.image import ImageSource, load_image
from edge_runtime.memory import choose_context, reckon
from edge_runtime.pipeline import Prepared, PromptOptions, pack_frames, prepare
from edge_runtime.products import check_instruction_set
from edge_runtime.prompt import OFFICIAL_CHAT_TEMPLATE, Prompt
from edge_runtime.requests import Finished, Request
from edge_runtime.sampling import MAX_NEW_TOKENS, choose_options
from edge_runtime.scheduler import embed
from edge_runtime.slicing import Slice, check_plan, plan_slices, slice_image
from edge_runtime.store import ModelPaths, find_model
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.weights import Float32, GGUFFile


@dataclass(frozen=True)
class Trace:
    """What the decoder computed for a prompt; for comparing with the official code."""

    logits: Float32
    """ndarray [shape=(vocabulary,), float32] after the prompt"""
    greedy: list[int]
    """The most probable continuation; end tokens do not stop it."""


class Model:
    """A loaded model. Make one with `Model.load`; it answers from any thread, many requests side by side."""

    def __init__(
        self,
        paths: ModelPaths,
        *,
        exact: bool,
        n_ctx: int | None,
        n_threads: int | None,
        force: bool,
        lora: str | Path | None = None,
    ) -> None:
        from edge_kernels.compile import cpu_count

        started = time.perf_counter()
        check_instruction_set()
        self.paths, self.exact = paths, exact
        self._encoder = ImageEncoder(paths.mmproj, exact=exact)
        threads = n_threads or cpu_count()
        file = GGUFFile(paths.decoder)
        config = decoder_config(file)
        n_ctx = choose_context(
            lambda n: reckon(file, self._encoder, n, exact=exact),
            paths.name,
            n_ctx,
            config.context_length,
            force=force,
        )
        self._decoder = Decoder(file, DecoderOptions(n_ctx, exact, threads, adapter=lora))
        try:
            self._check_pair()
            self.tokenizer = Tokenizer(self._decoder.file)
        except BaseException:
            self._decoder.close()
            raise
        self._template = self._decoder.file.get("tokenizer.chat_template", str, OFFICIAL_CHAT_TEMPLATE)
        self._engine = Engine(self._encoder, self._decoder, self.tokenizer)
        self._engine.call(lambda: _set_threads(threads))
        self.load_s = time.perf_counter() - started
        """Seconds that loading took."""

    @classmethod
    def load(
        cls,
        name: str | Path = "demo",
        *,
        mmproj: str | Path | None = None,
        lora: str | Path | None = None,
        exact: bool = False,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        force: bool = False,
    ) -> Model:
        """Load a model.

        Parameters
        ----------
        name : `demo`, a folder with a decoder and an `mmproj*` file, or a decoder file.
        mmproj : the mmproj file, when it does not lie beside the decoder.
        lora : GGUF adapter that is added to the decoder, as `edge-runtime convert --lora-adapter` writes it.
        exact : compute as the official float32 code does: float32 vision, float32 KV cache, no flash attention.
        n_ctx : context length in tokens, at most what the model was trained for; default 8192, less where memory is
            short.
        n_threads : default: the physical cores this process may use.
        force : load the model even if there seems to be too little memory.

        Raises
        ------
        ModelFileError
            When files are missing, damaged, ambiguous, or do not belong together.
        NotEnoughMemoryError
            When the model needs more than is free; with the numbers.
        """
        if n_ctx is not None and n_ctx < 1:
            raise MessageError(f"n_ctx is {n_ctx}; expected a positive number of tokens.")
        if n_threads is not None and n_threads < 1:
            raise MessageError(f"n_threads is {n_threads}; expected a positive number.")
        paths = find_model(name, mmproj)
        return cls(paths, exact=exact, n_ctx=n_ctx, n_threads=n_threads, force=force, lora=lora)

    def _check_pair(self) -> None:
        hidden, width = self._decoder.config.hidden, self._encoder.hidden
        if hidden != width:
            raise ModelFileError(
                f"{self.paths.decoder.name} has hidden size {hidden}, but the visual tokens of "
                f"{self.paths.mmproj.name} have {width}; use the decoder and the mmproj file of the same model."
            )

    @property
    def name(self) -> str:
        """What the model was called when it was loaded."""
        return self.paths.name

    @property
    def n_ctx(self) -> int:
        """Context length in tokens."""
        return self._decoder.n_ctx

    @overload
    def chat(self, messages: str | Sequence[Any], *, stream: Literal[False] = False, **options: Any) -> Answer: ...
    @overload
    def chat(self, messages: str | Sequence[Any], *, stream: Literal[True], **options: Any) -> AnswerStream: ...
    def chat(
        self,
        messages: str | Sequence[Any],
        *,
        stream: bool = False,
        thinking: bool = False,
        max_tokens: int = MAX_NEW_TOKENS,
        greedy: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        thinking_budget: int | None = None,
        repetition_check: bool = True,
        on_image: Callable[[int, int], None] = lambda done, total: None,
        **prompt_options: Any,
    ) -> Answer | AnswerStream:
        """Answer a conversation.

        Parameters
        ----------
        messages : a question, or a list of messages; see `edge_runtime.messages` for the accepted forms.
        stream : return an `AnswerStream` at once instead of the whole `Answer`.
        thinking : let the model reason before it answers.
        max_tokens : most tokens to generate, reasoning included.
        greedy, temperature, top_p, top_k, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty,
        seed : sampling, see `SamplingOptions`; the official defaults where not given.
            greedy and temperature=0 take the most probable token, without penalties.
        stop : strings that end the answer.
        thinking_budget : tokens after which reasoning is ended and the answer begins; None: no limit.
        repetition_check : end an answer that goes in circles, with the reason `repetition`.
        on_image : called with (decoded, total) while pictures are read.
        prompt_options : fields of `pipeline.PromptOptions`: max_slices, use_image_id, temporal_ids, tools,
            pixel_limit.

        Raises
        ------
        MessageError, ImageError, PromptTooLongError
            Before anything is computed.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise MessageError(f"max_tokens is {max_tokens!r}; expected a positive whole number.")
        if thinking_budget is not None and (type(thinking_budget) is not int or thinking_budget < 0):
            raise MessageError(f"thinking_budget is {thinking_budget!r}; expected a whole number of tokens, or None.")
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise MessageError(f"stop is {stop!r}; expected a string or a list of strings.")
        sampling = choose_options(
            thinking,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            min_p=min_p,
            typical_p=typical_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        started = time.perf_counter()
        prepared = self._prepare(messages, on_image, thinking=thinking, **prompt_options)
        image_s = time.perf_counter() - started
        request = Request(
            prepared.prompt,
            prepared.groups,
            prepared.digests,
            sampling,
            thinking,
            max_tokens,
            tuple(stop),
            thinking_budget,
            repetition_check,
        )

        def finish(answer: str, reasoning: str | None, end: Finished) -> Answer:
            timings = {
                "load": self.load_s,
                "image": image_s,
                **end.timings_s,
                "total": time.perf_counter() - started,
            }
            if timings["first_token"]:
                timings["first_token"] += image_s
            return Answer(
                answer=answer,
                reasoning=reasoning,
                finish_reason=end.reason,
                model=self.name,
                prompt_tokens=len(prepared.prompt.ids),
                visual_tokens=sum(last - first for first, last in prepared.prompt.bounds),
                cached_tokens=end.cached_tokens,
                completion_tokens=end.completion_tokens,
                slices=prepared.slices,
                timings_s={name: round(seconds, 6) for name, seconds in timings.items()},
            )

        answering = AnswerStream(self._engine.submit(request), finish)
        return answering if stream else answering.result()

    def achat(self, messages: str | Sequence[Any], **options: Any) -> AsyncAnswer:
        """Answer a conversation in an event loop.

            answer = await model.achat("What is it?")
            async for piece in model.achat("What is it?"): ...

        Parameters
        ----------
        messages, options : as of `chat`.
        """
        return AsyncAnswer(lambda: self.chat(messages, stream=True, **options))

    def _prepare(
        self,
        messages: str | Sequence[Any],
        on_image: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> Prepared:
        unknown = sorted(set(options) - set(PromptOptions.__dataclass_fields__))
        if unknown:
            raise TypeError(f"chat() got an unexpected keyword argument {unknown[0]!r}")
        return prepare(
            messages,
            PromptOptions(**options),
            slicing=self._encoder.slicing,
            tokenizer=self.tokenizer,
            n_queries=self._encoder.n_queries,
            template=self._template,
            on_image=on_image,
        )

    def slices(self, image: ImageSource, max_slices: int | None = None) -> list[Slice]:
        """Slices of a picture as the vision tower gets them."""
        picture = load_image(image)
        plan = plan_slices(*picture.size, self._encoder.slicing, max_slices)
        check_plan(*picture.size, plan, self._encoder.slicing)
        return slice_image(picture, plan, self._encoder.slicing)

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
        left, groups = iter(frames), []
        for ids in temporal_ids:
            groups += pack_frames([self.slices(next(left), max_slices) for _ in ids], ids)
        return self._engine.call(lambda: self._encoder.encode(groups))

    def vision_features(self, image: ImageSource, max_slices: int | None = None) -> list[Float32]:
        """Output of the vision tower, before the resampler: one ndarray [shape=(P, width), float32] per slice."""
        slices = self.slices(image, max_slices)
        return self._engine.call(lambda: [self._encoder.tower.encode([item])[0] for item in slices])

    def build_prompt(self, messages: str | Sequence[Any], **prompt_options: Any) -> Prompt:
        """Text, token ids and places of the visual tokens of a conversation, without computing anything."""
        return self._prepare(messages, **prompt_options).prompt

    def trace(self, messages: str | Sequence[Any], n_tokens: int, **prompt_options: Any) -> Trace:
        """Logits after the prompt and the `n_tokens` most probable tokens; for comparing with the official code."""
        prepared = self._prepare(messages, **prompt_options)

        def compute() -> Trace:
            self._decoder.prefill(self._embeddings(prepared))
            first = self._decoder.logits()
            logits, greedy = first, []
            for _ in range(n_tokens):
                greedy.append(int(np.argmax(logits)))
                self._decoder.decode(greedy[-1])
                logits = self._decoder.logits()
            return Trace(first, greedy)

        return self._engine.call(compute)

    def _embeddings(self, prepared: Prepared) -> Float32:
        tokens = self._encoder.encode(prepared.groups)
        places = dict(zip(prepared.prompt.bounds, tokens, strict=True))
        return embed(self._decoder, np.asarray(prepared.prompt.ids, np.int64), places)

    def close(self) -> None:
        """Free the memory; further calls raise."""
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _set_threads(n_threads: int) -> None:
    """Set numba's thread count, on the thread that will run the kernels: numba keeps it per thread."""
    from edge_kernels.compile import set_threads

    set_threads(n_threads)
