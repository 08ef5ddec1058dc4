"""A conversation → the messages of a request.

Calls of tools get ids here where the caller's messages have none: servers match results with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import Message, parse_messages
from edge_runtime.inputs.presets import with_preset
from edge_runtime.options import GenerationOptions, PreparationHooks
from edge_runtime.prompt.continuation import BegunTurn, find_begun_turn
from edge_runtime.remote.dialects import Dialect
from edge_runtime.remote.media import Media, Seen


@dataclass(frozen=True)
class Conversation:
    """What a request says."""

    messages: list[dict[str, Any]]
    begun: BegunTurn | None
    """The turn that the answer continues."""
    seen: Seen


def translate(
    messages: str | Sequence[Any], dialect: Dialect, options: GenerationOptions, hooks: PreparationHooks
) -> Conversation:
    """Translate a conversation; reads and encodes its files.

    Raises
    ------
    MessageError, ImageError
        When it cannot be used, or the server has no way to do what is asked.
    """
    parsed = parse_messages(messages)
    ids = _Ids(messages if not isinstance(messages, str) else [])
    conversation, begun = find_begun_turn(parsed, options.continue_final_message, thinking=options.thinking)
    _check_continuation(dialect, options, parsed, begun)
    if options.preset is not None:
        conversation = with_preset(conversation, options.preset)
    media = Media(dialect, options, hooks)
    translated = [
        _message(message, number, dialect, media, ids) for number, message in enumerate(media.expanded(conversation))
    ]
    return Conversation(translated, begun, media.seen)


def _check_continuation(
    dialect: Dialect, options: GenerationOptions, parsed: Sequence[Message], begun: BegunTurn | None
) -> None:
    if begun is not None and dialect.name == "openai":
        raise MessageError(
            f"The last message is the assistant's, but {dialect.title} starts a new turn after it; set "
            "continue_final_message=False if that is meant."
        )
    if parsed[-1].role == "assistant" and options.continue_final_message is False and dialect.name == "llama-server":
        raise MessageError(
            "continue_final_message is False, but llama-server always continues a last message of the assistant; "
            "append a question."
        )


class _Ids:
    """Ids of tool calls: those of the caller's messages, or new ones in order."""

    def __init__(self, entries: Sequence[Any]) -> None:
        self._entries = entries
        self._open: list[str] = []
        self._n_made = 0

    def _entry(self, number: int) -> Mapping[str, Any]:
        entry = self._entries[number] if number < len(self._entries) else {}
        return entry if isinstance(entry, Mapping) else {}

    def of_calls(self, calls: Sequence[Any]) -> list[str]:
        """An id for each call of a message."""
        self._open = []
        for call in calls:
            given = call.get("id") if isinstance(call, Mapping) else None
            if not isinstance(given, str) or not given:
                given = f"call_{self._n_made}"
                self._n_made += 1
            self._open.append(given)
        return [*self._open]

    def of_result(self, number: int) -> str:
        """The id of the call that a message answers: as it says, or the next without a result."""
        given = self._entry(number).get("tool_call_id")
        if isinstance(given, str) and given:
            self._open = [known for known in self._open if known != given]
            return given
        if not self._open:
            raise MessageError(
                f"Message {number} has the role tool, but no call is without a result; expected the assistant's "
                f"message "
                "with its tool_calls before it."
            )
        return self._open.pop(0)


def _message(message: Message, number: int, dialect: Dialect, media: Media, ids: _Ids) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role}
    if all(isinstance(part, str) for part in message.parts):
        found["content"] = "\n".join(str(part) for part in message.parts)
    elif message.role != "user":
        raise MessageError(
            f"Message {number} of the role {message.role} has a picture, which {dialect.title} takes only from "
            f"the user; "
            "put it into a message of the user."
        )
    else:
        found["content"] = [translated for part in message.parts for translated in media.parts(part)]
    if message.role == "tool":
        found["tool_call_id"] = ids.of_result(number)
    if message.tool_calls:
        numbers = ids.of_calls(message.tool_calls)
        found["tool_calls"] = [
            _call(call, call_id, number) for call, call_id in zip(message.tool_calls, numbers, strict=True)
        ]
    if message.reasoning and dialect.name != "openai":  # whose models get no reasoning back
        found["reasoning_content"] = message.reasoning
    return found


def _call(call: Any, call_id: str, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise MessageError(
            f"Message {number} has a tool call without a function; expected "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
        )
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}
