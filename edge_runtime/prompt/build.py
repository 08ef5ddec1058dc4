"""Messages and the shapes of their pictures → prompt text, token ids and the places of the visual tokens.

Three steps: `templates.render` (chat template in a sandbox), `expand` (image placeholders), `tokenize`. Knows
pictures only by their slice grids, not where their embeddings come from.

What the user typed stays text: special tokens in messages are guarded by a mark character before the template sees
them (see `Tokenizer.guard`), so no `<|im_end|>` or `<image>` from a user, a document or a tool can end a turn or move
a picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from edge_runtime.errors import MessageError, ModelFileError, PromptTooLongError
from edge_runtime.inputs.messages import ImagePart, Message
from edge_runtime.prompt.continuation import BegunTurn, render_continuation
from edge_runtime.prompt.long_text import LONG_TEXT, LONG_TEXTS, PIECE, nothing
from edge_runtime.prompt.templates import render
from edge_runtime.prompt.tokenizer import Tokenizer

PLACEHOLDER = "(<image>./</image>)"
"""What stands in a rendered prompt for each picture, as in the official processor."""

UNK, IMAGE, IMAGE_END = "<unk>", "<image>", "</image>"
SLICE, SLICE_END, ID, ID_END = "<slice>", "</slice>", "<image_id>", "</image_id>"

# Markup that the model may have written in an earlier turn: reasoning, tool calls, grounding boxes. Boundaries of
# turns and pictures are not among it, whoever wrote the message.
_ASSISTANT_MAY_WRITE = frozenset(
    f"<{slash}{name}>"
    for name in ("tool_call", "tool_response", "ref", "box", "quad", "point")
    for slash in ("", "/")
)
# The official way to ask where something is: name it in `<ref>`. These tags never start or end a turn or a picture.
_USER_MAY_WRITE = frozenset(f"<{slash}{name}>" for name in ("ref", "box", "quad", "point") for slash in ("", "/"))
_MAY_WRITE = {"assistant": _ASSISTANT_MAY_WRITE, "user": _USER_MAY_WRITE}
MESSAGE = 50
"""Characters of text that take as long as what is done for every message."""
_PRIVATE_USE = range(0xE000, 0xF900)
_PRIVATE = re.compile(f"[{chr(_PRIVATE_USE[0])}-{chr(_PRIVATE_USE[-1])}]")


@dataclass(frozen=True)
class ImageLayout:
    """The placeholder of one picture, or of one group of video frames."""

    index: int
    """Number of the picture (of the group's first frame) in the conversation."""
    grid: tuple[int, int]
    """(columns, rows) of cells; (0, 0) without cells."""
    frames: int = 1
    """Pictures that share the placeholder: more than one for packed video frames."""


@dataclass(frozen=True)
class PromptLimit:
    """How long a prompt may be that is worth tokenising."""

    n_ctx: int
    """Positions of the context, for the error."""
    text: int
    """Tokens of text that it has for certain: that many of the longest tokens."""
    total: int
    """Tokens that are counted; the count ends beyond them."""

    def check_text(self, n_tokens: int, n_characters: int) -> None:
        """Refuse text that is certain to have so many tokens."""
        if n_tokens > self.text:
            raise self._refusal(n_tokens, "tokens of text", n_characters)

    def check_total(self, n_tokens: int, n_characters: int) -> None:
        """Refuse a prompt of which so many tokens have been counted."""
        if n_tokens > self.total:
            raise self._refusal(n_tokens, "tokens", n_characters)

    def _refusal(self, n_tokens: int, what: str, n_characters: int) -> PromptTooLongError:
        return PromptTooLongError(
            f"The prompt has at least {n_tokens} {what} ({n_characters} characters), but the context holds "
            f"{self.n_ctx}, one of them for the answer; use a shorter text, or a larger --ctx.",
            *(n_tokens, self.n_ctx),
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the decoder."""

    text: str
    """The text as the official code would write it, placeholders expanded."""
    ids: list[int]
    bounds: list[tuple[int, int]]
    """[first, end) of every run of `<unk>` ids that visual tokens replace, in order."""


def build_prompt(
    messages: Sequence[Message],
    layouts: Sequence[ImageLayout],
    tokenizer: Tokenizer,
    *,
    n_queries: int,
    template: str,
    thinking: bool,
    use_image_id: bool,
    tools: Sequence[dict[str, Any]] = (),
    raw: bool = False,
    begun: BegunTurn | None = None,
    limit: PromptLimit | None = None,
    check: Callable[[], None] = nothing,
) -> Prompt:
    """Build the prompt of a conversation.

    Parameters
    ----------
    layouts : one per picture or group of frames, in order.
    n_queries : visual tokens per slice.
    template : the chat template (Jinja).
    thinking : whether the answer starts with reasoning.
    raw : use the messages' text as the prompt, without the template; special tokens in it count, except those that
        mark pictures.
    begun : the last message, if the prompt is to end inside it.
    limit : where a long prompt is refused before it is tokenised, or while it is.
    check : called often while a long text is read; what it raises ends the work.

    Raises
    ------
    PromptTooLongError
        When it exceeds `limit`; a prompt within it may be too long for the context, too.
    MessageError
        When the template refuses the conversation, or pictures and layouts do not match.
    ModelFileError
        When the vocabulary lacks the tokens that mark pictures, or the template is broken.
    """

    def look() -> None:
        check()
        LONG_TEXTS.pass_on()

    with LONG_TEXTS.turn() if _is_long(messages, tools) else nullcontext():
        mark = _unused_character(messages, tools, look)
        guard = _Guard(tokenizer, mark, look)
        text = _raw_text(messages, guard) if raw else _render(messages, guard, template, thinking, tools, begun)
        marked = _expand(_replace_surrogates(text), layouts, n_queries, use_image_id, mark)
        ids = _tokenize(marked, guard, limit)
        return Prompt(marked.replace(mark, ""), ids, _find_bounds(ids, layouts, tokenizer, n_queries))


def _is_long(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a conversation has a long text, or many short ones."""
    n_characters = sum(
        MESSAGE + sum(len(part) for part in message.parts if isinstance(part, str)) for message in messages
    )
    return n_characters > LONG_TEXT or sum(map(len, _texts(tools))) > LONG_TEXT


def _tokenize(marked: str, guard: _Guard, limit: PromptLimit | None) -> list[int]:
    """Ids of a rendered prompt, within its limit."""
    if limit is not None:
        limit.check_text(guard.tokenizer.min_n_tokens(marked, guard.mark, guard.check), len(marked))

    def check_count(n_tokens: int) -> None:
        guard.check()
        if limit is not None:
            limit.check_total(n_tokens, len(marked))

    return guard.tokenizer.encode_special(marked, guard.mark, check_count)


@dataclass(frozen=True)
class _Guard:
    """Guards the texts of one conversation; see `Tokenizer.guard`."""

    tokenizer: Tokenizer
    mark: str
    check: Callable[[], None]

    def text(self, text: str, allowed: frozenset[str] = frozenset()) -> str:
        return self.tokenizer.guard(text, self.mark, allowed, self.check)

    def all(self, value: Any) -> Any:
        """A JSON value with all its texts guarded, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.all(key): self.all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.all(item) for item in value]
        return value


def _raw_text(messages: Sequence[Message], guard: _Guard) -> str:
    """The text of all messages, with a placeholder for each picture."""
    if not any(part for message in messages for part in message.parts):
        raise MessageError("The raw prompt is empty; expected text for the model to continue.")
    holders = {UNK, IMAGE, IMAGE_END, SLICE, SLICE_END, ID, ID_END}
    allowed = frozenset(guard.tokenizer.special_ids) - holders
    parts = (part for message in messages for part in message.parts)
    # Adjacent texts are one text, in which `<ima` and `ge>` form a special token.
    runs = [(is_text, list(run)) for is_text, run in groupby(parts, lambda part: isinstance(part, str))]
    # Pictures before all text get lines of their own, as in the template; between texts they stay where they are.
    before = (PLACEHOLDER + "\n") * len(runs.pop(0)[1]) if not runs[0][0] else ""
    return before + "".join(
        guard.text("".join(map(str, run)), allowed) if is_text else PLACEHOLDER * len(run) for is_text, run in runs
    )


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which terminals and JSON can produce and no tokenizer accepts, with U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unused_character(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], check: Callable[[], None] = nothing
) -> str:
    """Pick a private-use character that occurs nowhere in the conversation."""
    used: set[str] = set()
    for text in _texts(
        [[message.role, message.reasoning, message.tool_calls, message.parts] for message in messages]
    ):
        _add_private(text, used, check)
    for text in _texts(tools):
        _add_private(text, used, check)
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise MessageError("The messages use every private-use character of Unicode; expected text. Send readable text.")


def _add_private(text: str, used: set[str], check: Callable[[], None]) -> None:
    if not text.isascii():
        for start in range(0, len(text), PIECE):  # other threads run in between
            used.update(_PRIVATE.findall(text, start, start + PIECE))
            check()


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _render(
    messages: Sequence[Message],
    guard: _Guard,
    template: str,
    thinking: bool,
    tools: Sequence[Any],
    begun: BegunTurn | None,
) -> str:
    guarded = [_template_message(message, guard) for message in messages]
    guarded_tools = [guard.all(tool) for tool in tools]

    def rendered(entries: Sequence[dict[str, Any]], asks: bool) -> str:
        context = {
            "messages": [*entries],
            "tools": guarded_tools or None,
            "add_generation_prompt": asks,
            "enable_thinking": thinking,
        }
        return render(template, context, guard.check)

    return rendered(guarded, True) if begun is None else render_continuation(begun, guarded, rendered, guard.mark)


def _template_message(message: Message, guard: _Guard) -> dict[str, Any]:
    """One message as templates expect it: its content is a string with a placeholder for each picture."""
    allowed = _MAY_WRITE.get(message.role, frozenset())
    texts = [guard.text(part, allowed) if isinstance(part, str) else PLACEHOLDER for part in message.parts]
    entry: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if message.reasoning is not None:
        # The model wrote both: officially, tags are markup in both, and the ids are those that it generated.
        entry["reasoning_content"] = guard.text(message.reasoning, allowed)
    if message.tool_calls:
        entry["tool_calls"] = guard.all(message.tool_calls)
    return entry


def _expand(rendered: str, layouts: Sequence[ImageLayout], n_queries: int, use_image_id: bool, mark: str) -> str:
    """Replace each placeholder. Further frames of a group lose theirs, and the text before it is stripped.

    A mark separates texts that become adjacent: `<ima` and `ge>` were guarded separately and form no special token.
    """
    chunks = rendered.split(PLACEHOLDER)
    if len(chunks) - 1 != sum(layout.frames for layout in layouts):
        raise MessageError(
            f"The rendered prompt has {len(chunks) - 1} places for pictures, expected "
            f"{sum(layout.frames for layout in layouts)}; the model's chat template drops or repeats content."
        )
    text, following = [chunks[0]], iter(chunks[1:])
    for layout in layouts:
        text.append(placeholder_text(layout, n_queries, use_image_id))
        text.append(next(following))
        for _ in range(layout.frames - 1):
            text[-1] = text[-1].strip()
            text += [mark, next(following)]
    return "".join(text)


def placeholder_text(layout: ImageLayout, n_queries: int, use_image_id: bool) -> str:
    """Text of one picture: its id, the overview, then the cells row by row, rows joined by a newline."""
    cols, rows = layout.grid
    holes = UNK * n_queries
    cells = "\n".join([f"{SLICE}{holes}{SLICE_END}" * cols] * rows)
    number = f"{ID}{layout.index}{ID_END}" if use_image_id else ""
    return f"{number}{IMAGE}{holes}{IMAGE_END}{cells}"


def _find_bounds(
    ids: list[int], layouts: Sequence[ImageLayout], tokenizer: Tokenizer, n_queries: int
) -> list[tuple[int, int]]:
    """Places of the visual tokens: after every `<image>` or `<slice>`, which only placeholders contain."""
    if not layouts:
        return []
    missing = [text for text in (UNK, IMAGE, IMAGE_END, SLICE, SLICE_END) if text not in tokenizer.special_ids]
    if missing:
        raise ModelFileError(
            f"The vocabulary lacks the tokens {', '.join(missing)}, which mark pictures; use the decoder file of "
            "MiniCPM-V 4.5."
        )
    opening = {tokenizer.special_ids[IMAGE], tokenizer.special_ids[SLICE]}
    return [(i + 1, i + 1 + n_queries) for i, token in enumerate(ids) if token in opening]


def iter_images(messages: Sequence[Message]) -> Iterator[ImagePart]:
    """All pictures of a conversation in order."""
    return (part for message in messages for part in message.parts if isinstance(part, ImagePart))
