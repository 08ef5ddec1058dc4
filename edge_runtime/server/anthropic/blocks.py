"""Content blocks of Anthropic's messages API → messages for `edge_runtime.inputs.messages`.

Every kind of block that Anthropic's clients know is handled here: read (`READ`, `TURN`), ignored (`PASSED_OVER`),
or refused by name (`REFUSED`). A client's string never becomes a path. Source: anthropic-sdk-python's types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from edge_runtime.server.content_parts import Part, checked_address
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.tools import called, given
from edge_runtime.system.base64_data import as_data_uri, is_data_uri

Block = Mapping[str, Any]

PASSED_OVER = {
    "redacted_thinking": "it is encrypted for Anthropic's servers, so it holds nothing that this model could read",
    "fallback": "it marks where Anthropic's servers changed the model, and no model is shown it",
}
"""Blocks that mean nothing to this model → why."""

_THEIR_TOOLS = "it belongs to a tool that runs on Anthropic's servers, and this server has no tools of its own"
REFUSED = {
    **dict.fromkeys(
        (
            *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
            *("bash_code_execution_tool_result", "text_editor_code_execution_tool_result"),
            *("tool_search_tool_result", "advisor_tool_result", "mcp_tool_use", "mcp_tool_result"),
            *("mcp_tool_listing", "browser_state"),
        ),
        _THEIR_TOOLS,
    ),
    "container_upload": "it names a file in a container at Anthropic, and this server has no containers",
    "compaction": "it is a summary of a conversation that Anthropic's servers shortened; send it as text",
    "tool_addition": "give tools under 'tools', for the whole conversation",
    "tool_removal": "give tools under 'tools', for the whole conversation",
}
"""Blocks that would have to be read and cannot be → why."""


def turn(role: str, content: str | list[Any], where: str) -> list[dict[str, Any]]:
    """Messages of one turn: tool results first, one message each, then the rest of the turn.

    Results carry the id of their call, and calls their own, under `id`, for `in_order`.

    Raises
    ------
    RequestError
        Names the block that is malformed, or that cannot be read here.
    """
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results, parts, calls, reasoning = [], [], [], []
    for number, block in enumerate(content):
        place = f"{where}[{number}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            results.append(_result(block, place))
        elif kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "thinking":
            reasoning.append(string(block, "thinking", place))
        else:
            parts += _parts(block, place)
    said = {
        "role": role,
        "content": parts,
        **given(tool_calls=calls or None, reasoning_content="\n".join(reasoning) or None),
    }
    return [*results, said] if parts or calls or reasoning or not results else results


def content_of(content: Any, where: str) -> str | list[Part]:
    """Translate content that holds no calls and no reasoning.

    Raises
    ------
    RequestError
        As for `turn`.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"The content is of type {type(content).__name__}; expected a string or a list of blocks.", where
        )
    return [part for number, block in enumerate(content) for part in _parts(block, f"{where}[{number}]")]


def in_order(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One conversation from its turns: neighbours of one role are merged, results are in the order of their calls.

    The model does not see the ids of calls, so only the order says which result belongs to which call.
    """
    found: list[dict[str, Any]] = []
    asked: list[str | None] = []
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        waiting.sort(key=lambda item: asked.index(item["id"]) if item["id"] in asked else len(asked))
        found.extend({key: value for key, value in item.items() if key != "id"} for item in waiting)
        waiting.clear()

    for message in messages:
        if message["role"] == "tool":
            waiting.append(dict(message))
            continue
        flush()
        own = dict(message)
        goes_on = bool(found) and found[-1]["role"] == own["role"] and own["role"] in ("user", "assistant")
        if "tool_calls" in own:
            calls = own["tool_calls"]
            asked = [*(asked if goes_on else ()), *(call.get("id") for call in calls)]
            own["tool_calls"] = [{key: value for key, value in call.items() if key != "id"} for call in calls]
        if goes_on:
            _join(found[-1], own)
        else:
            found.append(own)
    flush()
    return found


def _join(first: dict[str, Any], second: Mapping[str, Any]) -> None:
    """Merge a turn into the one before it, which has the same role."""
    first["content"] = [*_as_parts(first["content"]), *_as_parts(second["content"])]
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        first["tool_calls"] = calls
    reasoning = [item["reasoning_content"] for item in (first, second) if "reasoning_content" in item]
    if reasoning:
        first["reasoning_content"] = "\n".join(reasoning)


def _as_parts(content: str | list[Part]) -> list[Part]:
    if isinstance(content, str):
        return [_said(content)] if content else []
    return content


def referenced_tools(content: Any) -> Iterable[str]:
    """Names of the tools that a turn's blocks refer to (`tool_reference`), those inside results included."""
    for block in content if isinstance(content, list) else ():
        if isinstance(block, Mapping) and block.get("type") == "tool_reference":
            yield str(block.get("tool_name"))
        elif isinstance(block, Mapping) and block.get("type") == "tool_result":
            yield from referenced_tools(block.get("content"))


def string(block: Block, key: str, where: str) -> str:
    """A string field of a block.

    Raises
    ------
    RequestError
        When it is not a string.
    """
    value = block.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{key} is of type {type(value).__name__}; expected a string.", f"{where}.{key}")
    return value


def _said(text: str) -> Part:
    return {"type": "text", "text": text}


def _result(block: Block, where: str) -> dict[str, Any]:
    content = block.get("content")
    found = content_of("" if content is None else content, f"{where}.content")
    if block.get("is_error"):
        found = [_said("The call failed:"), *_as_parts(found)] if found else "The call failed."
    return {"role": "tool", "content": found, "id": block.get("tool_use_id")}


def _call(block: Block, where: str) -> dict[str, Any]:
    arguments = block.get("input", {})
    if not isinstance(arguments, Mapping):
        raise RequestError(f"The input of the call is of type {type(arguments).__name__}; expected an object.", where)
    return {"id": block.get("id"), **called(string(block, "name", where), arguments)}


def _parts(block: Any, where: str) -> list[Part]:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str) or (kind not in READ and kind not in PASSED_OVER):
        why = REFUSED.get(kind) if isinstance(kind, str) else None
        if why is not None:
            raise RequestError(f"The block of the type {kind!r} cannot be read here: {why}.", f"{where}.type")
        raise RequestError(
            f"The block has the type {str(kind)[:40]!r}; expected one of {', '.join(READ)}, or, in a message, "
            "tool_use, tool_result or thinking.",
            f"{where}.type",
        )
    if kind in PASSED_OVER:
        return []
    cited = block.get("citations")
    if isinstance(cited, Mapping) and cited.get("enabled"):
        raise RequestError(
            "citations.enabled is true, but this model cannot cite what it was given; leave it out.",
            f"{where}.citations",
        )
    return READ[kind](block, where)


def _text(block: Block, where: str) -> list[Part]:
    return [_said(string(block, "text", where))]


def _image(block: Block, where: str) -> list[Part]:
    wishes = block.get("transformations")
    if isinstance(wishes, Mapping) and wishes.get("oversized_image") not in (None, "downsize"):
        raise RequestError(
            f"oversized_image is {str(wishes['oversized_image'])[:40]!r}, but this model accepts pictures of any "
            "size and scales them to its cells; leave it out.",
            f"{where}.transformations.oversized_image",
        )
    return [{"type": "image_url", "image_url": {"url": _address(block, "image/png", where)}}]


def _document(block: Block, where: str) -> list[Part]:
    """A document as pages, or its text and pictures if it consists of these; title and context come first."""
    before = [_said(block[key]) for key in ("title", "context") if isinstance(block.get(key), str) and block[key]]
    source, place = block.get("source"), f"{where}.source"
    kind = source.get("type") if isinstance(source, Mapping) else None
    if isinstance(source, Mapping) and kind == "text":
        return [*before, _said(string(source, "data", place))]
    if isinstance(source, Mapping) and kind == "content":
        return [*before, *_as_parts(content_of(source.get("content"), f"{place}.content"))]
    file = {"file_data": _address(block, "application/pdf", where)}
    if isinstance(block.get("title"), str):
        file["filename"] = block["title"]
    return [*before, {"type": "file", "file": file}]


def _search_result(block: Block, where: str) -> list[Part]:
    title, source = string(block, "title", where), string(block, "source", where)
    found = content_of(block.get("content"), f"{where}.content")
    return [_said(f"Search result: {title} ({source})"), *_as_parts(found)]


def _tool_reference(block: Block, where: str) -> list[Part]:
    return [_said(f"Tool: {string(block, 'tool_name', where)}")]


def _address(block: Block, media_type: str, where: str) -> str:
    """The bytes of a block as a data: URI, or its http address."""
    source, place = block.get("source"), f"{where}.source"
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "file":
        raise RequestError(
            "The source is of the type 'file', but this server stores no uploaded files; send the bytes as base64.",
            f"{place}.type",
        )
    if not isinstance(source, Mapping) or kind not in ("base64", "url"):
        raise RequestError(
            'The source has no bytes; expected {"type": "base64", "media_type": ..., "data": ...}.', place
        )
    if kind == "url":
        return checked_address(source.get("url"), f"{place}.url")
    named = source.get("media_type", media_type)
    if not isinstance(named, str) or not all(part.isalnum() for part in named.translate(_PUNCTUATION).split()):
        raise RequestError(f"The media type is {str(named)[:40]!r}; expected a type such as {media_type}.", place)
    data = string(source, "data", place)
    return data if is_data_uri(data) else as_data_uri(data, named)


_PUNCTUATION = str.maketrans(dict.fromkeys("/+-.", " "))
READ: dict[str, Callable[[Block, str], list[Part]]] = {
    "text": _text,
    "image": _image,
    "document": _document,
    "search_result": _search_result,
    "tool_reference": _tool_reference,
}
"""Blocks that are shown to the model, besides those that occur in turns only (`TURN`)."""
TURN = ("tool_use", "tool_result", "thinking")
"""Blocks that become a message of their own, or belong to the whole turn."""
