"""Requests of llama-server's own completions → calls, for one model. Source: its `server-schema.cpp` and README.

Enters: the body, checked by pydantic, and the model's tokenizer, since prompts may mix text and token ids. Leaves:
`ChatCall`s. Other fields are handled in `fields.refused`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from edge_runtime.errors import PromptTooLongError
from edge_runtime.generation.sampling import SamplingOptions
from edge_runtime.option_checks import check_sampling
from edge_runtime.options import GenerationOptions
from edge_runtime.pipeline import MAX_COUNTED
from edge_runtime.prompt.long_text import LONG_TEXT
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.server.content_parts import Part
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.refused import Refused
from edge_runtime.server.fields.sampling import SamplingFields, length
from edge_runtime.server.fields.tools import given
from edge_runtime.server.inference import ChatCall
from edge_runtime.server.openai.llama_server_facts import MEDIA_MARKER
from edge_runtime.server.openai.requests import MAX_PROMPTS

UNLIMITED = 1 << 30
_OF_CHATS = Refused("which belongs to /v1/chat/completions; expected 'prompt'")
OF_COMPLETION = {
    **dict.fromkeys(
        ("messages", "tools", "tool_choice", "response_format", "reasoning_effort", "chat_template_kwargs"), _OF_CHATS
    ),
    "echo": Refused("but the answer holds only what follows the prompt; leave it out"),
    "adaptive_target": Refused("but this server's sampler does not have it; leave it out", (-1,)),
    "reasoning_budget_tokens": Refused("but this route continues the prompt verbatim; leave it out", (-1,)),
}
"""Fields that this route cannot honour, besides those that no route can."""
_SHAPES = (
    'expected a string, a list of token ids and strings, {"prompt_string": ..., "multimodal_data": [...]}, or a list '
    "of these"
)


@dataclass(frozen=True)
class TextReader:
    """Tokenises the texts between token ids, for one model; off the event loop, since they may be long."""

    tokenizer: Tokenizer
    n_ctx: int
    """Positions of the context."""
    check: Callable[[], None]
    """Called often; what it raises ends the work."""

    def prompt(self, text: str) -> list[int]:
        """Ids of a part of a prompt, special tokens included.

        Raises
        ------
        PromptTooLongError
            When it is too long to be counted.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self.check_total(self.tokenizer.min_n_tokens(text, "", self.check))
        return self.tokenizer.encode_special(text, "", self.check_total)

    def check_total(self, n_tokens: int) -> None:
        """Refuse a prompt of so many tokens if it need not be counted further."""
        self.check()
        if n_tokens > MAX_COUNTED * self.n_ctx:
            raise PromptTooLongError(
                f"The prompt has at least {n_tokens} tokens, but the context holds {self.n_ctx}, one of them for the "
                "answer; use a shorter text, or a larger --ctx.",
                *(n_tokens, self.n_ctx),
            )


class LlamaCompletionRequest(SamplingFields):
    """Body of `POST /completion`."""

    prompt: Any = Field(description="A text, token ids, both mixed, an object with `multimodal_data`, or several.")
    n_predict: int | None = Field(None, ge=-1, description="-1: no limit; 0 only computes the prompt.")
    max_tokens: int | None = Field(None, ge=-1)
    max_completion_tokens: int | None = Field(None, ge=-1)
    n_cmpl: int | None = Field(None, ge=1, description="Answers to each prompt.")
    n: int | None = Field(None, ge=1)
    n_probs: int | None = Field(None, ge=0, le=20)
    logprobs: int | None = Field(None, ge=0, le=20, description="The same, if `n_probs` is not given.")
    return_tokens: bool | None = None
    response_fields: list[str] | None = Field(None, description="Fields of a whole reply; `a/b` is `b` inside `a`.")
    id_slot: int | None = Field(None, description="Ignored: sequences are chosen by their contents.")

    @property
    def n_answers(self) -> int:
        """Answers to each prompt."""
        return self.n_cmpl or self.n or 1

    @property
    def n_top(self) -> int:
        """Number of most probable tokens returned with each token; 0 returns none."""
        return (self.logprobs if self.n_probs is None else self.n_probs) or 0

    @property
    def returns_ids(self) -> bool:
        """Whether the ids of the answer's tokens are returned."""
        return bool(self.stream or self.return_tokens)

    @property
    def most_tokens(self) -> int | None:
        """Limit of an answer; None if the server decides."""
        return self._limit()[0]

    def _limit(self) -> tuple[int | None, str | None]:
        fields = ("n_predict", "max_completion_tokens", "max_tokens")
        name = next((name for name in fields if getattr(self, name) is not None), None)
        if name is not None and getattr(self, name) == -1:
            return UNLIMITED, name
        return length(*((name, getattr(self, name)) for name in fields))

    def all_warnings(self) -> list[str]:
        """Sentences about ignored fields; fields that must not be ignored are refused.

        Raises
        ------
        RequestError
            Names the field.
        """
        return self.warnings(OF_COMPLETION)

    def names(self) -> dict[str, str]:
        """Options of `Model.submit` → fields of this request, for errors."""
        return {**super().names(), **self._form()[1], "max_tokens": self._limit()[1] or "n_predict"}

    def _form(self) -> tuple[dict[str, Any], dict[str, str]]:
        options, names = self.form()
        if options == {"schema": {}}:  # an empty schema means any object there
            return {"json": True}, {"json": names["schema"]}
        return options, names

    def calls(self, reader: TextReader) -> list[ChatCall]:
        """One for each prompt.

        Raises
        ------
        RequestError
            When a prompt is malformed, or the request asks for something that this server does not do.
        """
        most, options = self.most_tokens, self._options(reader)
        options |= given(max_tokens=most or None, prompt_only=most == 0 or None, **self._form()[0])
        if self.n_top or self.returns_ids:
            options |= {"logprobs": True, "top_logprobs": self.n_top}
        return [
            ChatCall(
                self.model, messages, {**options, **more}, self.n_answers, reports_progress=self.reports_progress
            )
            for messages, more in (_prompt(item, where, reader) for where, item in self._prompts())
        ]

    def settings(self, reader: TextReader) -> SamplingOptions:
        """Sampling settings, defaults included.

        Raises
        ------
        MessageError
            Names the option that is out of range.
        """
        wanted, names = self._options(reader), SamplingOptions.__dataclass_fields__
        options = GenerationOptions(**{name: value for name, value in wanted.items() if name in names})
        check_sampling(options)
        return options.sampling_options()

    def texts(self, reader: TextReader) -> list[str]:
        """The prompts as text."""
        return [_as_text(item, reader) for _, item in self._prompts()]

    def _options(self, reader: TextReader) -> dict[str, Any]:
        """Options other than the length, with texts in `logit_bias` replaced by their tokens."""
        bias = self.logit_bias
        pairs = [*bias.items()] if isinstance(bias, dict) else [*(bias or ())]
        plain: list[Any] = []
        n_characters = 0
        for pair in pairs:
            key = pair[0] if isinstance(pair, list | tuple) and len(pair) == 2 else None
            if isinstance(key, str) and not (key.isascii() and key.isdecimal()):
                n_characters += len(key)
                if n_characters > LONG_TEXT:
                    raise RequestError(
                        f"logit_bias holds texts of more than {LONG_TEXT} characters; expected words. Shorten it.",
                        "logit_bias",
                    )
                plain += [(token_id, pair[1]) for token_id in reader.tokenizer.encode(key)]
            else:
                plain.append(pair)
        body = self.model_copy(update={"logit_bias": plain or None})
        return {"raw": True, **body.sampling_options()}

    def _prompts(self) -> list[tuple[str, Any]]:
        """Each prompt with its place in the request."""
        prompt = self.prompt
        if isinstance(prompt, list) and not any(_is_id(item) for item in prompt):
            if not 0 < len(prompt) <= MAX_PROMPTS:
                raise RequestError(f"prompt is a list of {len(prompt)}; expected 1 to {MAX_PROMPTS}.", "prompt")
            return [(f"prompt[{number}]", item) for number, item in enumerate(prompt)]
        return [("prompt", prompt)]


def _is_id(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def _prompt(item: Any, where: str, reader: TextReader) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """Messages of a raw prompt, and further options for it."""
    if isinstance(item, dict) and isinstance(item.get("prompt_string"), str):
        data = item.get("multimodal_data")
        if data is None:
            return item["prompt_string"], {}
        return [{"role": "user", "content": _with_media(item["prompt_string"], data, where)}], {}
    if isinstance(item, dict) and isinstance(item.get("prompt_string"), list):
        return _prompt(item["prompt_string"], f"{where}.prompt_string", reader)
    if isinstance(item, str):
        return item, {}
    if isinstance(item, list) and item and any(_is_id(part) for part in item):
        return "", {"prompt_ids": _ids(item, where, reader)}
    raise RequestError(f"{where} is {str(item)[:60]!r}; {_SHAPES}.", where)


def _ids(parts: list[Any], where: str, reader: TextReader) -> list[int]:
    """Token ids; each text between them is tokenised by itself."""
    found: list[int] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            found += reader.prompt(part)
            reader.check_total(len(found))
        elif type(part) is int and 0 <= part < len(reader.tokenizer.tokens):
            found.append(part)
        else:
            raise RequestError(
                f"{where}[{number}] is {str(part)[:40]!r}; expected a string, or a token id from 0 to "
                f"{len(reader.tokenizer.tokens) - 1}.",
                where,
            )
    return found


def _with_media(text: str, data: Any, where: str) -> list[Part]:
    """The text cut at its marks, with a picture at each."""
    place = f"{where}.multimodal_data"
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise RequestError(f"{place} is not a list of strings; expected pictures in base64.", place)
    first, *rest = text.split(MEDIA_MARKER)
    if len(rest) != len(data):
        raise RequestError(
            f"{place} has {len(data)} pictures, but prompt_string has {len(rest)} marks for them; expected one "
            f"{MEDIA_MARKER} for each, which GET /props returns as media_marker.",
            place,
        )
    parts: list[Part] = [{"type": "text", "text": first}] if first else []
    for item, after in zip(data, rest, strict=True):
        parts.append({"type": "image_url", "image_url": {"url": item}})
        after = after.removeprefix("\n")  # a picture in a raw prompt has a line of its own
        if after:
            parts.append({"type": "text", "text": after})
    return parts


def _as_text(item: Any, reader: TextReader) -> str:
    if isinstance(item, dict):
        return _as_text(item["prompt_string"], reader)
    if isinstance(item, str):
        return item
    return b"".join(map(reader.tokenizer.token_bytes, _ids(item, "prompt", reader))).decode("utf-8", "replace")
