"""`Model`: the public face, thin over `pipeline` (what goes in) and `engine` (what comes out)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from edge_runtime.answers import TOY_NOTICE, Answer, AnswerStream, AsyncAnswer, make_answer, results
from edge_runtime.cache.disk import DEFAULT_LIMIT_BYTES
from edge_runtime.cache.shared_prefixes import Beginnings
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.events import Finished
from edge_runtime.engine.request import Request
from edge_runtime.errors import MessageError
from edge_runtime.generation.logprobs import TokenLogprobs, describe, describe_prompt
from edge_runtime.generation.sampling import MAX_NEW_TOKENS, choose_options
from edge_runtime.generation.token_rules import choose_rules
from edge_runtime.inputs.workers.pool import Decoders
from edge_runtime.internals import Inside
from edge_runtime.loading.load import LoadOptions, load_parts, set_threads
from edge_runtime.next_turn import NextTurnPrefill
from edge_runtime.options import (
    check_begun,
    check_counts,
    check_form,
    check_lengths,
    check_scores,
    check_streaming,
    count_beams,
)
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.store.find import ModelPaths, find_model
from edge_runtime.structured_output.answer_form import choose_form
from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.text_form import choose_text_form
from edge_runtime.structured_output.tools import checked_tools, function_names
from edge_runtime.structured_output.vocabulary import GrammarVocabulary
from edge_runtime.weights.config import is_toy


class Model(Inside):
    """A loaded model. Make one with `Model.load`; it answers from any thread, many requests side by side."""

    def __init__(self, paths: ModelPaths, options: LoadOptions) -> None:
        started = time.perf_counter()
        self.paths, self.exact = paths, options.exact
        self._low_memory = options.low_memory
        parts = load_parts(paths, options)
        self._encoder, self._decoder, self.tokenizer = parts.encoder, parts.decoder, parts.tokenizer
        self.template = self._decoder.file.get("tokenizer.chat_template", str, OFFICIAL_CHAT_TEMPLATE)
        """The chat template (Jinja)."""
        self.is_toy = is_toy(self._decoder.file)
        """Whether its file says that its answers are not to be believed, as the demo's does."""
        self._engine = Engine(self._encoder, self._decoder, self.tokenizer, parts.caches)
        self._next_turn = NextTurnPrefill(self._engine)
        self._beginnings = Beginnings()
        self._engine.call(lambda: set_threads(parts.n_threads))
        if options.warms_up:
            self.warm_up()
        self.load_s = time.perf_counter() - started
        """Seconds that loading took."""

    @classmethod
    def load(
        cls,
        name: str | Path = "demo",
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
            folder with a decoder and an `mmproj*` file, or a decoder file.
        mmproj : the mmproj file, when it does not lie beside the decoder.
        exact : compute as the official float32 code does: float32 vision, float32 KV cache, no flash attention.
        n_ctx : context length in tokens, at most what the model was trained for; default 8192, less where memory is
            short.
        n_threads : default: the physical cores this process may use.
        force : load the model even if there seems to be too little memory.
        kv_type : numbers of the KV cache: `f16`, or `q8_0` or `q4_0`, which take half and a quarter of the memory.
        low_memory : drop the vision weights whenever no picture is waiting; the next one reads them again.
        cache_dir : folder where visual tokens and beginnings of conversations are kept between processes.
        cache_limit : most bytes in that folder.
        adapters : name to file of the LoRA adapters that `chat(adapter=NAME)` can choose.
        tuned : use what `edge-runtime bench --tune` found for this model on this machine, where nothing is given.

        Raises
        ------
        ModelFileError
            When files are missing, damaged, ambiguous, not pulled, or do not belong together.
        NotEnoughMemoryError
            When the model needs more than is free; with the numbers.
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

    @property
    def name(self) -> str:
        """What the model was called when it was loaded."""
        return self.paths.name

    @overload
    def chat(self, messages: str | Sequence[Any], *, stream: Literal[False] = False, **options: Any) -> Answer: ...
    @overload
    def chat(self, messages: str | Sequence[Any], *, stream: Literal[True], **options: Any) -> AnswerStream: ...
    def chat(self, messages: str | Sequence[Any], *, stream: bool = False, **options: Any) -> Answer | AnswerStream:
        """Answer a conversation.

        Parameters
        ----------
        messages : a question, or a list of messages; see `edge_runtime.inputs.messages` for the accepted forms.
        stream : return an `AnswerStream` at once instead of the whole `Answer`; not with beams, whose answer is
            known at the end only.
        options : as of `submit`.

        Raises
        ------
        MessageError, ImageError, PromptTooLongError
            Before anything is computed.
        """
        (answering,) = self._submit(messages, 1, stream, options)
        return answering if stream else answering.result()

    @overload
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: Literal[False] = False, **options: Any
    ) -> list[Answer]: ...
    @overload
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: Literal[True], **options: Any
    ) -> list[AnswerStream]: ...
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: bool = False, **options: Any
    ) -> list[Answer] | list[AnswerStream]:
        """Draw several answers to one conversation, side by side; its prompt is prepared and computed once.

        Parameters
        ----------
        n : number of answers. With a seed, the i-th has the seed + i, and is what `chat` with that seed says.
        messages, stream, options : as of `chat`.
        """
        answering = self._submit(messages, n, stream, options)
        return answering if stream else results(answering)

    def _submit(
        self, messages: str | Sequence[Any], n: int, stream: bool, options: dict[str, Any]
    ) -> list[AnswerStream]:
        if "n" in options:
            raise MessageError(f"n is {options['n']!r}, but chat gives one answer; call chat_n.")
        if stream:
            check_streaming(options)
        return self.submit(messages, n=n, **options)

    def submit(
        self,
        messages: str | Sequence[Any],
        *,
        n: int = 1,
        thinking: bool = False,
        max_tokens: int = MAX_NEW_TOKENS,
        sampling: bool = True,
        beams: int | None = None,
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
        logit_bias: Mapping[int, float] | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        prompt_only: bool = False,
        reuse: bool = True,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        ignore_eos: bool = False,
        allowed_token_ids: Sequence[int] | None = None,
        stop_in_reasoning: bool = False,
        thinking_budget: int | None = None,
        repetition_check: bool = True,
        adapter: str | None = None,
        follow_up: bool = False,
        schema: Mapping[str, Any] | None = None,
        json: bool = False,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        on_image: Callable[[int, int], None] = lambda done, total: None,
        on_look: Callable[[float], None] = lambda share: None,
        on_check: Callable[[], None] = lambda: None,
        decoders: Decoders | None = None,
        **prompt_options: Any,
    ) -> list[AnswerStream]:
        """Begin answers to a conversation and return at once: what `chat` and `chat_n` do before they wait.

        Parameters
        ----------
        messages : a question, or a list of messages; see `edge_runtime.inputs.messages` for the accepted forms.
        n : number of answers, see `chat_n`.
        thinking : let the model reason before it answers.
        max_tokens : most tokens to generate, reasoning included.
        greedy, temperature, top_p, top_k, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty,
        seed : sampling, see `SamplingOptions`; the official defaults where not given.
            greedy and temperature=0 take the most probable token, without penalties.
        sampling : False searches as the official code does: 3 beams, repetition penalty 1.2.
        beams : number of beams of a search for the most probable answer; its pieces come all at the end, and it is
            not looked at for circles. See `edge_runtime.generation.beam_search`.
        logit_bias : token id → what is added to its logit, from -100 to 100.
        logprobs : tell the log probability of every token; see `edge_runtime.generation.logprobs`.
        top_logprobs : and of so many of the most probable ones at its place, at most 20.
        prompt_logprobs : with `logprobs`, of the tokens of a prompt without pictures, too; it is computed anew then.
        prompt_only : end where the prompt is computed, with an empty answer.
        reuse : False computes the prompt anew, whatever is remembered of it in memory or on disk; its pictures are
            taken from memory all the same. The same question is then computed in the same chunks each time.
        stop : strings that end the answer; they are not part of it.
        stop_token_ids, min_tokens, ignore_eos, allowed_token_ids : see `token_rules`.
        stop_in_reasoning : whether they end it in the reasoning already.
        thinking_budget : tokens after which reasoning is ended and the answer begins; None: no limit.
        repetition_check : end an answer that goes in circles, with the reason `repetition`.
        adapter : name of a LoRA adapter the model was loaded with; None takes the model as it is.
        follow_up : another turn is expected: read this one's answer as history while nobody waits; see `next_turn`.
        schema : JSON schema of the answer, which is then JSON of it, without line breaks; it begins after the
            reasoning. The model is not told: say in the question what is wanted.
        json : the answer is some JSON object.
        choices, regex, grammar : the answer is one of these texts, matches a regular expression as a whole, or is
            derived by a grammar (GBNF or Lark); see `text_form`. One of them at most, and no schema.
        tools : functions the model may call, in OpenAI's form; see `tools`.
        tool_choice : "auto", "none" (the model is not told of them), "required" (the answer is one call), or a
            function's name (a call of that one).
        on_image : called with (decoded, total) while pictures are read and pages drawn.
        on_look : called often with the share that is done while an index of videos is made; their frames are
            decoded later, beside the encoding.
        on_check : called often while the form of the answer is worked out, and while decoders are waited for. What
            one of these three raises ends the work.
        decoders : processes in which pictures, documents and videos are decoded, within limits of time and memory:
            for files of people one does not know. None: in this process.
        prompt_options : fields of `pipeline.PromptOptions`: max_slices, use_image_id, temporal_ids, pixel_limit,
            video_limits, context_shift, raw, fit, preset, continue_final_message (whether the answer goes on with a
            last message of the assistant's); for documents pages, dpi, password, page_limit, file_limit_bytes.

        Raises
        ------
        MessageError, ImageError, PromptTooLongError
            Before anything is computed.
        """
        self.check_usable()
        stop = check_lengths(max_tokens, thinking_budget, stop)
        n_beams = count_beams(beams, sampling)
        check_counts(
            n=n,
            beams=n_beams,
            most_beams=self._decoder.n_sequences,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            thinking_budget=thinking_budget,
        )
        chosen = choose_options(
            thinking,
            greedy=greedy,
            searching=not sampling or n_beams > 1,
            n_vocab=self._decoder.config.vocabulary,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            min_p=min_p,
            typical_p=typical_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            logit_bias=logit_bias,
        )
        started = time.perf_counter()
        tools = checked_tools(tools, tool_choice)
        effort = Effort(check=on_check)
        form = choose_form(
            schema, json, tools, tool_choice, thinking, self.tokenizer, lambda: self._grammar_vocabulary, effort
        )
        texts = {"choices": choices, "regex": regex, "grammar": grammar}
        bound = choose_text_form(texts, form, bool(tools), lambda: self._grammar_vocabulary, effort)
        check_form(bound is not None, n_beams)
        rules = choose_rules(
            *(stop_token_ids, min_tokens, ignore_eos, allowed_token_ids),
            tokenizer=self.tokenizer,
            is_bound=bound is not None or n_beams > 1,
            has_stops=bool(stop),
        )
        prepared = self._prepare(
            messages,
            *(on_image, on_look, on_check, decoders),
            room=0 if prompt_only else max_tokens,
            refuse=True,
            thinking=thinking,
            tools=tools,
            **prompt_options,
        )
        if prompt_logprobs:
            check_scores(logprobs=logprobs, n_beams=n_beams, has_pictures=bool(prepared.groups))
        begun = prepared.begun
        if begun is not None:
            check_begun(begun, tools)
            bound = bound.behind(begun.content) if bound is not None else None
            thinking = begun.is_reasoning
        if bound is not None and thinking:
            room = min(max_tokens, self.n_ctx - len(prepared.prompt.ids))
            thinking_budget = bound.limit_reasoning(thinking_budget, room)
        image_s = time.perf_counter() - started
        request = Request(
            prepared.prompt,
            prepared.groups,
            prepared.digests,
            chosen,
            thinking,
            0 if prompt_only else max_tokens,
            stop,
            thinking_budget,
            repetition_check,
            stop_in_reasoning,
            top_logprobs if logprobs else None,
            n_beams,
            adapter,
            bound,
            tuple(function_names(tools)),
            begun,
            rules,
            shared=prepared.shared,
            reuse=reuse,
        )

        def finish(answer: str, reasoning: str | None, scores: list[TokenLogprobs], end: Finished) -> Answer:
            timings = {
                "load": self.load_s,
                "image": image_s,
                **end.timings_s,
                "total": time.perf_counter() - started,
            }
            if timings["first_token"]:
                timings["first_token"] += image_s
            given = scores if logprobs else None
            ids = prepared.prompt.ids
            found = make_answer(
                prepared,
                end,
                answer,
                reasoning,
                model=self.name,
                timings=timings,
                logprobs=given,
                prompt_logprobs=describe_prompt(ids, end.prompt_scores, self.tokenizer) if prompt_logprobs else None,
                end_logprobs=None if end.end_score is None else describe(end.end_score, "answer", self.tokenizer),
                notice=TOY_NOTICE if self.is_toy else None,
            )
            if follow_up:
                self._next_turn.follow(prepared, request, found)
            return found

        requests = [
            replace(request, sampling=chosen.numbered(i), scores_prompt=prompt_logprobs and i == 0) for i in range(n)
        ]
        return [AnswerStream(running, finish) for running in self._engine.submit_all(requests)]

    @cached_property
    def _grammar_vocabulary(self) -> GrammarVocabulary:
        return GrammarVocabulary(self.tokenizer, self._decoder.config.vocabulary)

    def achat(self, messages: str | Sequence[Any], **options: Any) -> AsyncAnswer:
        """Answer a conversation in an event loop.

            answer = await model.achat("What is it?")
            async for piece in model.achat("What is it?"): ...

        Parameters
        ----------
        messages, options : as of `chat`.
        """
        return AsyncAnswer(lambda streaming, options: self._submit(messages, 1, streaming, options)[0], options)

    def warm_up(self) -> None:
        """Compute what chats shared when this model was last loaded (system prompt and tools) while nobody asks.

        Returns at once. Of use with a `cache_dir`, which has it written down: the first chat then begins with its
        own words. Whoever asks meanwhile interrupts it.
        """
        self._engine.warm_up()

    def close(self) -> None:
        """Free the memory; further calls raise."""
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
