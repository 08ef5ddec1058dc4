"""`Model`: the public interface, a thin layer over `pipeline` (input) and `engine` (output)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from edge_runtime.answers import TOY_NOTICE, Answer, AnswerStream, AsyncAnswer, make_answer, results
from edge_runtime.cache.disk import DEFAULT_LIMIT_BYTES
from edge_runtime.engine.events import Finished
from edge_runtime.engine.request import Request
from edge_runtime.errors import MessageError
from edge_runtime.generation.logprobs import TokenLogprobs, describe, describe_prompt
from edge_runtime.inputs.mistaken_paths import refuse_mistaken_paths
from edge_runtime.loading.load import LoadOptions
from edge_runtime.loading.loaded_model import LoadedModel
from edge_runtime.next_turn import NextTurnPrefill
from edge_runtime.option_checks import check_conversation, check_streaming, checked_options
from edge_runtime.options import GenerationKeywords, GenerationOptions
from edge_runtime.pipeline import Prepared
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.store.find import ModelPaths, find_model
from edge_runtime.structured_output.answer_form import choose_form
from edge_runtime.structured_output.constraint import AnswerForm
from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.text_form import TextForm, choose_text_form
from edge_runtime.structured_output.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from edge_runtime.remote.keywords import ConnectKeywords
    from edge_runtime.remote.model import RemoteModel


@dataclass(frozen=True)
class _Submitted:
    """What is known of an answer when its request is submitted."""

    prepared: Prepared
    request: Request
    started: float
    """Time by `time.perf_counter` before pictures were decoded."""
    image_s: float
    """Seconds of preparation."""


def _form(
    options: GenerationOptions, tokenizer: Tokenizer, vocabulary: Callable[[], GrammarVocabulary], effort: Effort
) -> AnswerForm | TextForm | None:
    """What the answer must look like; None if it is free."""
    schema, json, tools, choice = options.schema, options.json, options.tools, options.tool_choice
    form = choose_form(schema, json, tools, choice, options.thinking, tokenizer, vocabulary, effort)
    return form or choose_text_form(options.text_forms, vocabulary, effort)


def _timings(of: _Submitted, load_s: float, end: Finished) -> dict[str, float]:
    """Seconds of an answer's parts; the first token is counted from before the pictures were decoded."""
    timings = {"load": load_s, "image": of.image_s, **end.timings_s, "total": time.perf_counter() - of.started}
    if timings["first_token"]:
        timings["first_token"] += of.image_s
    return timings


MAX_TOKEN_CHARACTERS = 32
"""Characters that a token hardly ever has more of."""


class Model(LoadedModel):
    """A loaded model. Create one with `Model.load`; it answers from any thread, many requests in parallel."""

    def __init__(self, paths: ModelPaths, options: LoadOptions) -> None:
        super().__init__(paths, options)
        self._next_turn = NextTurnPrefill(self._engine)

    @classmethod
    def load(
        cls,
        name: str | Path | ModelPaths = "demo",
        *,
        mmproj: str | Path | None = None,
        exact: bool = False,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        force: bool = False,
        kv_type: str | None = None,
        low_memory: bool = False,
        cache_dir: str | Path | None = None,
        cache_limit: int = DEFAULT_LIMIT_BYTES,
        adapters: Mapping[str, str | Path] | None = None,
        tuned: bool = True,
    ) -> Model:
        """Load a model.

        Parameters
        ----------
        name : `demo`, a pulled model (`edge-runtime pull`), `ollama:NAME` from the Ollama store of this machine, a
            folder with a decoder and an `mmproj*` file, a decoder file, or the paths of both files.
        mmproj : the mmproj file, if it is not in the decoder's folder.
        exact : compute as the official float32 code does: float32 vision, float32 KV cache, no flash attention.
        n_ctx : context length in tokens, at most what the model was trained for; default 8192, in low memory 4096,
            less if memory is short.
        n_threads : at most the processors this process may use; default: the physical cores.
        force : load the model even if there seems to be too little memory.
        kv_type : number type of the KV cache: `f16`, or `q8_0` or `q4_0` with half or a quarter of the memory; in low
            memory the default is `q8_0`.
        low_memory : keep one layer of the vision part in memory at a time, none while no picture is waiting; chosen
            by itself where nothing else fits, which a line in the log tells.
        cache_dir : folder where visual tokens and prefixes of conversations are stored across processes.
        cache_limit : maximum bytes in that folder.
        adapters : LoRA files by name, for `chat(adapter=NAME)` to choose from.
        tuned : use what `edge-runtime bench --tune` found for this model on this machine, where no argument is given.

        Raises
        ------
        ModelFileError
            When files are missing, damaged, ambiguous, not pulled, or do not belong together.
        NotEnoughMemoryError
            When the model needs more than is free; the message has the numbers, and says what would fit.
        """
        options = LoadOptions(
            exact=exact,
            n_ctx=n_ctx,
            n_threads=n_threads,
            force=force,
            kv_type=kv_type,
            low_memory=low_memory,
            cache_dir=cache_dir,
            cache_limit=cache_limit,
            adapters=adapters or {},
            tuned=tuned,
        )
        return cls(find_model(name, mmproj), options.checked())

    @staticmethod
    def connect(url: str, model: str | None = None, **how: Unpack[ConnectKeywords]) -> RemoteModel:
        """Use a model on a server that speaks OpenAI's API, by the same calls.

        Parameters
        ----------
        url : of the server, with or without `/v1`.
        model : as the server calls it; None takes its default, its first, or its only one.
        how : dialect, key, times and retries; `help(edge_runtime.remote.keywords.ConnectKeywords)` explains them.

        Raises
        ------
        MessageError, EndpointError
            When an argument is wrong, or no model is named of several; when the server cannot be reached, or refuses.
        """
        from edge_runtime.remote.connection import Patience
        from edge_runtime.remote.model import RemoteModel

        times: dict[str, Any] = {**how}
        dialect, key = times.pop("dialect", None), times.pop("key", None)
        return RemoteModel.connect(url, model, dialect=dialect, key=key, patience=Patience(**times))

    @overload
    def chat(
        self, messages: str | Sequence[Any], *, stream: Literal[False] = False, **options: Unpack[GenerationKeywords]
    ) -> Answer: ...
    @overload
    def chat(
        self, messages: str | Sequence[Any], *, stream: Literal[True], **options: Unpack[GenerationKeywords]
    ) -> AnswerStream: ...
    def chat(
        self, messages: str | Sequence[Any], *, stream: bool = False, **options: Unpack[GenerationKeywords]
    ) -> Answer | AnswerStream:
        """Answer a conversation.

        Parameters
        ----------
        messages : a question, or a list of messages, `[{"role": "user", "content": [Path("a.jpg"), "What is it?"]}]`;
            see `edge_runtime.inputs.messages` for the accepted forms. A string is text, never a file's name.
        stream : return an `AnswerStream` at once instead of the whole `Answer`; not with beams, whose answer is known
            only at the end.
        options : keywords, all optional; `help(edge_runtime.GenerationOptions)` explains each. The common ones:

            max_tokens (int), stop (list of texts) : end the answer.
            thinking (bool), thinking_budget (int) : reason before the answer, with at most so many tokens.
            temperature, top_p, top_k, seed, greedy (bool), beams (int) : how tokens are chosen.
            schema (dict), json (bool), choices (list), regex (str) : what the answer must look like.
            tools (list), tool_choice : functions that the model may call.
            max_slices (int), fit (bool or tokens), pages, dpi, preset : how pictures and documents are read.
            logprobs (bool), top_logprobs (int) : tell how sure the model was.

        Raises
        ------
        MessageError, ImageError, PromptTooLongError
            Before anything is computed.
        TypeError
            When an option is unknown.
        """
        (answering,) = self._submit(messages, 1, stream, options)
        return answering if stream else answering.result()

    @overload
    def chat_n(
        self,
        messages: str | Sequence[Any],
        n: int,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerationKeywords],
    ) -> list[Answer]: ...
    @overload
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: Literal[True], **options: Unpack[GenerationKeywords]
    ) -> list[AnswerStream]: ...
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: bool = False, **options: Unpack[GenerationKeywords]
    ) -> list[Answer] | list[AnswerStream]:
        """Sample several answers to one conversation in parallel; the prompt is prepared and computed once.

        Parameters
        ----------
        n : number of answers. With a seed, the i-th uses seed + i and equals the answer of `chat` with that seed.
        messages, stream, options : as of `chat`.
        """
        answering = self._submit(messages, n, stream, options)
        return answering if stream else results(answering)

    def achat(self, messages: str | Sequence[Any], **options: Unpack[GenerationKeywords]) -> AsyncAnswer:
        """Answer a conversation in an event loop.

            answer = await model.achat("What is it?")
            async for piece in model.achat("What is it?"): ...

        Parameters
        ----------
        messages, options : as of `chat`.
        """
        return AsyncAnswer(lambda streaming, options: self._submit(messages, 1, streaming, options)[0], options)

    def submit(
        self, messages: str | Sequence[Any], *, n: int = 1, **options: Unpack[GenerationKeywords]
    ) -> list[AnswerStream]:
        """Start answers to a conversation and return at once: what `chat` and `chat_n` do before they wait.

        Parameters
        ----------
        n : number of answers, see `chat_n`.
        messages, options : as of `chat`.

        Raises
        ------
        MessageError, ImageError, PromptTooLongError
            Before anything is computed.
        TypeError
            When an option is unknown.
        """
        self.check_usable()
        asked, hooks = GenerationOptions.of({**options, "n": n})
        asked = checked_options(asked, self.limits)
        started = time.perf_counter()
        form = _form(asked, self.tokenizer, lambda: self.grammar_vocabulary, Effort(check=hooks.on_check))
        reserve_tokens = 0 if asked.prompt_only else asked.max_tokens
        prepared = self._prepare(messages, asked, hooks, reserve_tokens, refuse=True)
        request = _request(self, prepared, asked, form)
        finish = partial(self._finish, _Submitted(prepared, request, started, time.perf_counter() - started))
        sampling = asked.sampling_options()
        requests = [
            replace(request, sampling=sampling.numbered(i), scores_prompt=asked.prompt_logprobs and i == 0)
            for i in range(n)
        ]
        return [AnswerStream(running, finish) for running in self._engine.submit_all(requests)]

    def _submit(
        self, messages: str | Sequence[Any], n: int, stream: bool, options: Mapping[str, Any]
    ) -> list[AnswerStream]:
        if "n" in options:
            raise MessageError(f"n is {options['n']!r}, but chat gives one answer; call chat_n.")
        if stream:
            check_streaming(GenerationOptions.of(options)[0])
        refuse_mistaken_paths(messages)
        return self.submit(messages, n=n, **options)

    @cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The vocabulary for llguidance; built when a form is first requested."""
        return GrammarVocabulary(self.tokenizer, self._decoder.config.vocabulary)

    def _finish(
        self, of: _Submitted, text: str, reasoning: str | None, scores: list[TokenLogprobs], end: Finished
    ) -> Answer:
        """Build the answer when the engine has finished it, and prefill the start of the next turn."""
        options, prompt_ids = of.request.options, of.prepared.prompt.ids
        scored = describe_prompt(prompt_ids, end.prompt_scores, self.tokenizer) if options.prompt_logprobs else None
        answer = make_answer(
            of.prepared,
            end,
            text,
            reasoning,
            model=self.name,
            timings=_timings(of, self.load_s, end),
            logprobs=scores if options.logprobs else None,
            prompt_logprobs=scored,
            end_logprobs=None if end.end_score is None else describe(end.end_score, "answer", self.tokenizer),
            notice=TOY_NOTICE if self.is_toy else None,
        )
        if options.follow_up:
            self._next_turn.follow(of.prepared, of.request, answer)
        return answer


def _request(
    model: Model, prepared: Prepared, options: GenerationOptions, form: AnswerForm | TextForm | None
) -> Request:
    """Build the engine's request, with the options adapted to this conversation."""
    begun, thinking, budget = prepared.begun, options.thinking, options.thinking_budget
    check_conversation(options, begun, has_pictures=bool(prepared.groups))
    if begun is not None:
        form = None if form is None else form.continuing(begun.content)
        thinking = begun.is_reasoning
    if form is not None and thinking:
        n_left = min(options.max_tokens, model.n_ctx - len(prepared.prompt.ids))
        budget = form.limit_reasoning(budget, n_left)
    return Request(
        prepared.prompt,
        prepared.groups,
        prepared.digests,
        replace(
            options,
            thinking=thinking,
            thinking_budget=budget,
            max_tokens=0 if options.prompt_only else options.max_tokens,
        ),
        rules=options.token_rules(model.tokenizer.stop_ids),
        form=form,
        begun=begun,
        expected=_expected(model, prepared, options),
        shared=prepared.shared,
    )


def _expected(model: Model, prepared: Prepared, options: GenerationOptions) -> tuple[list[int], ...]:
    """Tokens of what the answer probably is, with changes."""
    texts = [text for text in (options.expected_text, prepared.page_text) if text]
    if "expected" not in options.draft_sources:
        return ()
    # No answer is longer than the context, and few tokens than this many characters.
    return tuple(model.tokenizer.encode(text[: MAX_TOKEN_CHARACTERS * model.n_ctx]) for text in texts)


if TYPE_CHECKING:
    AnyModel = Model | RemoteModel
    """A model on this machine or on a server: both answer by the same calls."""
