"""What a caller asks of an answer: all options in one object.

`Model.chat` and the other methods take options as keyword arguments (`GenerationKeywords`) and build a
`GenerationOptions` from them. It is checked once (`option_checks`), before anything is computed, and passed on whole:
to the pipeline, which uses the part that affects the prompt (`PromptOptions`), and to the engine, in a `Request`.
Knows nothing of how options are implemented.

A new option is a field and a line in the docstring of `GenerationOptions`, the same name in `GenerationKeywords`, and
a check of its values, and of what it excludes, in `option_checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypedDict

from edge_runtime.generation.sampling import GREEDY, MAX_NEW_TOKENS, OFFICIAL_BEAMS, SamplingOptions
from edge_runtime.generation.token_rules import TokenRules
from edge_runtime.inputs.documents import DocumentOptions
from edge_runtime.inputs.image import PIXEL_LIMIT
from edge_runtime.inputs.pages import PageChoice
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.workers.pool import Decoders


@dataclass(frozen=True, kw_only=True)
class PreparationHooks:
    """Progress callbacks of the preparation, and what decodes its files; documented in `GenerationOptions`.

    They are not part of the options: a request lives until its answer ends, and a callback may hold the answer, which
    is cancelled when nobody holds it any more.
    """

    on_image: Callable[[int, int], None] = lambda done, total: None
    on_look: Callable[[float], None] = lambda share: None
    on_check: Callable[[], None] = lambda: None
    decoders: Decoders | None = None


DRAFT_SOURCES = ("grammar", "suffix", "expected")
"""What next tokens can be guessed from."""

NO_HOOKS = PreparationHooks()
"""No callbacks, and this process decodes."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions(DocumentOptions):
    """How messages become a prompt: the options of `Model.build_prompt`, documented in `GenerationOptions`."""

    thinking: bool = False
    max_slices: int | None = None
    use_image_id: bool | None = None
    temporal_ids: Sequence[Sequence[int]] | None = None
    tools: Sequence[dict[str, Any]] = ()
    raw: bool = False
    prompt_ids: Sequence[int] | None = None
    pixel_limit: int = PIXEL_LIMIT
    video_limits: VideoLimits = VideoLimits()  # noqa: RUF009 - frozen
    context_shift: bool = False
    fit: bool | int = False
    preset: str | None = None
    continue_final_message: bool | None = None

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> tuple[Self, PreparationHooks]:
        """Build both from keyword arguments; an unknown one is a TypeError, as in Python's own functions."""
        hooks = {field.name for field in fields(PreparationHooks)}
        unknown = sorted(keywords.keys() - cls.__dataclass_fields__.keys() - hooks)
        if unknown:
            raise TypeError(f"chat() got an unexpected keyword argument {unknown[0]!r}")
        options = {name: value for name, value in keywords.items() if name not in hooks}
        looking_on = {name: value for name, value in keywords.items() if name in hooks}
        return cls(**options), PreparationHooks(**looking_on)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(PromptOptions):
    """Every option of `Model.chat`, `chat_n`, `achat` and `submit`, which take them as keyword arguments.

    Reasoning, length and end
        thinking : let the model reason before it answers. Default: off.
        max_tokens : maximum tokens to generate, reasoning included. Default: 2048, the official value.
        thinking_budget : tokens after which reasoning is ended and the answer starts. Default: no limit.
        stop : strings that end the answer; they are not part of it.
        stop_in_reasoning : whether they also end it during the reasoning. Default: no.
        stop_token_ids, min_tokens, ignore_eos, allowed_token_ids : more tokens that end the answer, tokens before
            which nothing ends it, whether the model's own end is never chosen, the only tokens that may be chosen;
            see `token_rules`. Not with a form or a search.
        repetition_check : end an answer that repeats itself, with the reason `repetition`. Default: on.
        prompt_only : stop when the prompt is computed, with an empty answer.

    Which tokens are chosen
        temperature, top_p, top_k, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty, seed :
            see `generation.sampling.SamplingOptions`. Default: the official values, 0.7, 0.8, 100, off, off, 1.03, 0
            and 0 (with thinking 0.7, 1, 50, off, off, 1, 0 and 0), and a random seed.
        greedy : always take the most probable token, without penalties; so does temperature=0.
        sampling : False searches as the official code does: 3 beams, repetition penalty 1.2. Default: True.
        beams : number of beams of a search for the most probable answer; its pieces all come at the end, and
            repetition is not checked. See `generation.beam_search`. Default: 1, none.
        logit_bias : token id → what is added to its logit, from -100 to 100.
        n : number of answers, see `Model.chat_n`. Default: 1.

    Form of the answer: at most one of these, apart from tools beside a schema
        schema : JSON schema of the answer, which is then JSON that matches it, without line breaks, and starts after
            the reasoning. The model does not see the schema: say in the question what you want.
        json : the answer is some JSON object.
        choices, regex, grammar : the answer is one of these texts, matches a regular expression as a whole, or is
            derived by a grammar (GBNF or Lark); see `structured_output.text_form`.
        tools : functions the model may call, in OpenAI's form; see `structured_output.tools`.
        tool_choice : "auto" (default), "none" (the model does not see them), "required" (the answer is one call),
            or a function's name (a call of that one).

    What is reported with the answer
        logprobs : the log probability of every token; see `generation.logprobs`.
        top_logprobs : and of this many of the most probable ones at its position, at most 20.
        prompt_logprobs : with `logprobs`, of the tokens of a prompt without pictures, too; it is then computed again.

    Prompt
        continue_final_message : whether the answer continues the last message, if that is the assistant's: None
            (default) does (see `prompt.continuation`), True requires that it is the assistant's, False starts a new
            turn after it.
        preset : name of a question to ask, see `inputs.presets`.
        raw : use the text as the prompt, without the chat template.
        prompt_ids : token ids that are the prompt as they are; with `raw`, in place of messages.
        context_shift : leave out the oldest turns of a conversation that does not fit, instead of rejecting it.

    Pictures, documents and videos
        max_slices : maximum cells per picture. Default: the model's limit, 9.
        fit : cut all pictures into fewer cells until the conversation fits; a number: until they take so many tokens.
        use_image_id : whether pictures are numbered. Default: the model's setting; with a video none is, as in the
            official code.
        temporal_ids : groups of frame times in units of 0.1 s that cover all pictures in order; -1 marks a still
            picture.
        pixel_limit : maximum pixels of a picture or frame. Default: 200 million.
        pages : pages of documents, counted from 1: a number, numbers, or text like "1,3,7-9". Default: all.
        dpi : dots per inch of pages that are drawn. Default: as many pixels as the slices of a page can use.
        password : of documents.
        page_limit : maximum pages of one document. Default: 2000.
        file_limit_bytes : maximum bytes of a document. Default: 1 GiB.
        video_limits : maximum bytes and pixels of a video, see `inputs.video.frame_choice.VideoLimits`.

    How it is computed
        adapter : name of a LoRA adapter the model was loaded with. Default: the model without one.
        reuse : False computes the prompt again, whatever is held of it in memory or on disk; visual tokens of its
            pictures are still reused from memory. The same question is then computed in the same chunks each time.
        drafts : guess the next tokens and check several in one call, which changes no answer: "auto", "off", or names
            of sources: "grammar" (what the form of the answer forces), "suffix" (what prompt, answer and earlier
            answers have said before), "expected" (`expected_text`). "auto" takes all, as far as they make answers
            faster.
        expected_text : what the answer will probably be, with changes, such as a file that is to be edited.
        follow_up : another turn is expected: prefill this one's answer as history while idle; see `next_turn`.
        on_image : called with (decoded, total) while pictures are read and pages drawn.
        on_look : called often with the share that is done while an index of videos is built; their frames are decoded
            later, in parallel with the encoding.
        on_check : called often while the form of the answer is compiled, and while waiting for decoders. An exception
            from one of these three ends the work.
        gives_way : the request is computed only while no other is queued or running, and while this returns False; it
            is called often, on the engine's thread. What is at work when another request comes is interrupted.
            Default: it takes its turn.
        decoders : processes that decode pictures, documents and videos, within limits of time and memory: for files
            from strangers. Default: this process.
    """

    max_tokens: int = MAX_NEW_TOKENS
    thinking_budget: int | None = None
    stop: Sequence[str] = ()
    stop_in_reasoning: bool = False
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    allowed_token_ids: Sequence[int] | None = None
    repetition_check: bool = True
    prompt_only: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    greedy: bool = False
    sampling: bool = True
    beams: int | None = None
    logit_bias: Mapping[int, float] | None = None
    n: int = 1
    schema: Mapping[str, Any] | None = None
    json: bool = False
    choices: Sequence[str] | None = None
    regex: str | None = None
    grammar: str | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    adapter: str | None = None
    reuse: bool = True
    drafts: str | Sequence[str] = "auto"
    expected_text: str | None = None
    follow_up: bool = False
    gives_way: Callable[[], bool] | None = None

    @property
    def draft_sources(self) -> Sequence[str]:
        """Names of the sources of drafts that may be used."""
        if isinstance(self.drafts, str):
            return DRAFT_SOURCES if self.drafts == "auto" else () if self.drafts == "off" else (self.drafts,)
        return self.drafts

    @property
    def n_beams(self) -> int:
        """Beams of the search: as given, otherwise 1, or the official number with `sampling=False`."""
        if self.beams is not None:
            return self.beams
        return 1 if self.sampling else OFFICIAL_BEAMS

    @property
    def searches(self) -> bool:
        """Whether the official `sampling=False` or a beam search is requested; neither samples."""
        return not self.sampling or self.n_beams > 1

    @property
    def text_forms(self) -> dict[str, Any]:
        """Those of `choices`, `regex` and `grammar` that were given."""
        given = {"choices": self.choices, "regex": self.regex, "grammar": self.grammar}
        return {name: value for name, value in given.items() if value is not None}

    def sampling_options(self) -> SamplingOptions:
        """How tokens are chosen: the official values, overridden by those given."""
        names = SamplingOptions.__dataclass_fields__.keys() - {"logit_bias"}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:  # ids may be strings of digits, as in JSON
            pairs = {int(token_id): float(bias) for token_id, bias in self.logit_bias.items()}
            given["logit_bias"] = tuple(sorted(pairs.items()))
        if self.searches:
            return replace(SamplingOptions.official_search(), **given)
        if self.greedy:
            given["temperature"] = 0.0
        is_greedy = given.get("temperature") == 0
        return replace(GREEDY if is_greedy else SamplingOptions.official(self.thinking), **given)

    def token_rules(self, stop_ids: frozenset[int]) -> TokenRules | None:
        """Which tokens may be chosen, and which end the answer; None if no option says so.

        Parameters
        ----------
        stop_ids : the model's own end tokens.
        """
        if not any(self.rules_given(stop_ids).values()):
            return None
        allowed = None if self.allowed_token_ids is None else tuple(self.allowed_token_ids)
        return TokenRules(frozenset(self.stop_token_ids), self.min_tokens, self.ignore_eos, allowed)

    def rules_given(self, stop_ids: frozenset[int]) -> dict[str, bool]:
        """Which of the options of `token_rules` were given."""
        return {
            "stop_token_ids": bool({*self.stop_token_ids} - stop_ids),  # the model's own also end a form
            "min_tokens": self.min_tokens > 0,
            "ignore_eos": self.ignore_eos,
            "allowed_token_ids": self.allowed_token_ids is not None,
        }


class PromptKeywords(TypedDict, total=False):
    """Keyword arguments of `Model.build_prompt`, documented in `GenerationOptions`."""

    pages: PageChoice | None
    dpi: float | None
    password: str | None
    page_limit: int
    file_limit_bytes: int
    thinking: bool
    max_slices: int | None
    use_image_id: bool | None
    temporal_ids: Sequence[Sequence[int]] | None
    tools: Sequence[dict[str, Any]]
    raw: bool
    prompt_ids: Sequence[int] | None
    pixel_limit: int
    video_limits: VideoLimits
    context_shift: bool
    fit: bool | int
    preset: str | None
    continue_final_message: bool | None
    on_image: Callable[[int, int], None]
    on_look: Callable[[float], None]
    on_check: Callable[[], None]
    decoders: Decoders | None


class GenerationKeywords(PromptKeywords, total=False):
    """Keyword arguments of `Model.chat` and its like, documented in `GenerationOptions`; `n` is `Model.chat_n`'s."""

    max_tokens: int
    thinking_budget: int | None
    stop: Sequence[str]
    stop_in_reasoning: bool
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    allowed_token_ids: Sequence[int] | None
    repetition_check: bool
    prompt_only: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    greedy: bool
    sampling: bool
    beams: int | None
    logit_bias: Mapping[int, float] | None
    schema: Mapping[str, Any] | None
    json: bool
    choices: Sequence[str] | None
    regex: str | None
    grammar: str | None
    tool_choice: str | Mapping[str, Any]
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    adapter: str | None
    reuse: bool
    drafts: str | Sequence[str]
    expected_text: str | None
    follow_up: bool
    gives_way: Callable[[], bool] | None
