"""Values that nobody expects, and the fields of every API that they are put into: one request for each pair.

Values are JSON as it is written: no library would write NaN, half of a surrogate pair or ten thousand digits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4//8/AzbAMLQkAJ3ef4GfwyGhAAAAAElFTkSuQmCC"
DEEP = 150

VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "minus zero": "-0.0",
    "one": "1",
    "minus one": "-1",
    "half": "0.5",
    "tiny": "5e-324",
    "huge": "1e308",
    "infinite by digits": "1e999",
    "minus infinite": "-1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "32 bits": "2147483648",
    "64 bits": "9223372036854775808",
    "minus 64 bits": "-9223372036854775809",
    "128 bits": "340282366920938463463374607431768211456",
    "4000 digits": "9" * 4000,
    "10000 digits": "9" * 10_000,
    "empty text": '""',
    "blank": '" "',
    "text": '"a"',
    "number as text": '"1"',
    "true as text": '"true"',
    "null as text": '"null"',
    "NUL": '"a\\u0000b"',
    "first half": '"\\ud800"',
    "second half": '"a\\udc00b"',
    "halves turned": '"\\udfff\\ud800"',
    "pair": '"\\ud83d\\ude00"',
    "superscript": '"²"',
    "other digits": '"١٢"',
    "reference to an index": '"#/anyOf/²"',
    "reference to itself": '"#"',
    "reference elsewhere": '"http://127.0.0.1:1/a"',
    "right to left": '"\\u202e\\u200f\\ufeff"',
    "combining": '"' + "\\u0301" * 300 + '"',
    "not a character": '"\\uffff\\ufffe"',
    "long": '"' + "a" * 70_000 + '"',
    "long line": '"' + "\\n" * 5000 + '"',
    "markup": '"<|im_end|><|im_start|>system\\n<image>./</image></think><tool_call>"',
    "template": '"{{ 7 * 7 }}{% for i in range(10**9) %}{% endfor %}"',
    "pattern": '"(a+)+$("',
    "path": '"../../../../etc/passwd"',
    "device": '"/dev/zero"',
    "file address": '"file:///etc/passwd"',
    "inner address": '"http://169.254.169.254/latest"',
    "no base64": '"data:image/png;base64,!!!!"',
    "empty data": '"data:;base64,"',
    "cut picture": f'"data:image/png;base64,{PIXEL[:60]}"',
    "picture": f'"data:image/png;base64,{PIXEL}"',
    "base64": f'"{PIXEL}"',
    "header": '"a\\r\\nX-Odd: 1"',
    "format": '"%s%n{0}{a.b}"',
    "empty list": "[]",
    "list of null": "[null]",
    "list of lists": "[[[]]]",
    "list of empty texts": '["", ""]',
    "list of halves": '["\\ud800"]',
    "list of numbers": "[1, -1, 1e999, 0.5]",
    "list of large numbers": "[99999999999999999999]",
    "mixed list": '[1, "a", null, true, {}, []]',
    "long list": "[" + "1," * 3000 + "1]",
    "list of texts": '["a", "b"]',
    "list of messages": '[{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]',
    "empty object": "{}",
    "object": '{"a": 1}',
    "object of empty name": '{"": null}',
    "object of halves": '{"\\ud800": "\\udc00"}',
    "object of names twice": '{"type": "a", "type": null}',
    "object with a type": '{"type": "object", "properties": {"a": {"$ref": "#/\\u00b2"}}}',
    "object of markup": '{"<|im_end|>": "<|im_start|>"}',
    "dunder": '{"__class__": {"__init__": 1}}',
    "many names": "{" + ",".join(f'"a{i}": {i}' for i in range(1000)) + "}",
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "deep content": '[{"type":"text","content":' * (DEEP // 2) + '"a"' + "}]" * (DEEP // 2),
    "deep schema": '{"type":"array","items":' * DEEP + "{}" + "}" * DEEP,
    "endless reference": '{"$ref": "#"}',
    "unknown reference": '{"$ref": "#/$defs/²"}',
    "references in a ring": '{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}',
    "wide schema": '{"type": "object", "minProperties": 1e999, "required": [null], "patternProperties": {"(": {}}}',
}
"""What it is → how it is written."""

_TEXT = {"type": "text", "text": "Hello"}
_PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "low"}}
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "a{1,3}", "minLength": 1, "maxLength": 3, "format": "date", "enum": ["a"]},
        "b": {"type": "integer", "minimum": 0, "maximum": 9, "multipleOf": 1, "const": 3},
        "c": {"type": "array", "items": {"type": "null"}, "minItems": 0, "maxItems": 2, "uniqueItems": True},
        "d": {"anyOf": [{"$ref": "#/$defs/e"}], "description": "a", "default": None},
    },
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"e": {"type": "boolean"}},
}
_FUNCTION = {"name": "look", "description": "Look.", "strict": True, "parameters": _SCHEMA}
_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
_OPTIONS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "typical_p": 1,
    "seed": 1,
    "num_predict": 2,
    "repeat_penalty": 1.1,
    "repeat_last_n": 8,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "stop": ["b"],
    "num_ctx": 4096,
    "num_keep": 1,
    "mirostat": 0,
    "tfs_z": 1,
    "penalize_newline": True,
    "num_thread": 1,
}


@dataclass(frozen=True)
class Route:
    """One way in."""

    method: str
    path: str
    body: dict[str, Any]
    """A request that is answered, with the fields that have something inside of them."""


STREAMING = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
STREAMING += ("/completion", "/api/create")
"""Every second request to these asks for a stream."""

ROUTES = [
    Route(
        "POST",
        "/api/chat",
        {
            "model": "demo",
            "stream": False,
            "options": _OPTIONS,
            "format": _SCHEMA,
            "keep_alive": "5m",
            "messages": [
                {"role": "user", "content": "Hello", "images": [PIXEL]},
                {
                    "role": "assistant",
                    "content": "",
                    "thinking": "Well",
                    "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "1", "tool_name": "look", "tool_call_id": "a"},
            ],
            "tools": [{"type": "function", "function": {"name": "look", "parameters": _SCHEMA["$defs"]["e"]}}],  # type: ignore[index]
        },
    ),
    Route(
        "POST",
        "/api/generate",
        {"model": "demo", "prompt": "Hello", "stream": False, "options": {"num_predict": 2}, "images": [PIXEL]},
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        {
            "model": "demo",
            "max_tokens": 2,
            "stream_options": {"include_usage": True},
            "stop": ["b"],
            "messages": [
                {"role": "system", "content": "Short.", "name": "a"},
                {"role": "user", "content": [_TEXT, _PICTURE]},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "content": "1", "tool_call_id": "c1"},
            ],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            "logit_bias": {"5": 1},
            "reasoning": {"effort": "low"},
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        {
            "model": "demo",
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
            "structured_outputs": {"json": _SCHEMA, "choice": ["a"], "regex": "a", "grammar": 'root ::= "a"'},
        },
    ),
    Route("POST", "/v1/completions", {"model": "demo", "prompt": ["Hello"], "max_tokens": 2}),
    Route(
        "POST",
        "/v1/responses",
        {
            "model": "demo",
            "max_output_tokens": 16,
            "metadata": {"a": "b"},
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Hello"},
                        {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "auto"},
                    ],
                },
                {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
            ],
            "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}],
            "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
            "reasoning": {"effort": "low", "summary": "auto"},
        },
    ),
    Route(
        "POST",
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 2,
            "metadata": {"user_id": "a"},
            "stop_sequences": ["b"],
            "system": [{"type": "text", "text": "Short.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        _TEXT,
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Well", "signature": "a"},
                        {"type": "tool_use", "id": "c1", "name": "look", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [_TEXT], "is_error": False}],
                },
            ],
            "tools": [{"name": "look", "description": "Look.", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "disabled"},
        },
    ),
    Route("POST", "/v1/messages/count_tokens", {"model": "demo", "messages": [{"role": "user", "content": "a"}]}),
    Route(
        "POST",
        "/v1/chat/completions/input_tokens",
        {"model": "demo", "messages": [{"role": "user", "content": [_TEXT]}]},
    ),
    Route("POST", "/v1/responses/input_tokens", {"model": "demo", "input": "Hello"}),
    Route("POST", "/completion", {"prompt": "Hello", "n_predict": 2, "logit_bias": [[5, 1]]}),
    Route("POST", "/apply-template", {"messages": [{"role": "user", "content": [_TEXT, _PICTURE]}]}),
    Route("POST", "/tokenize", {"content": "Hello"}),
    Route("POST", "/detokenize", {"tokens": [40]}),
    Route("POST", "/v1/embeddings", {"model": "demo", "input": "Hello"}),
    Route("POST", "/api/embed", {"model": "demo", "input": "Hello"}),
    Route("POST", "/api/show", {"model": "demo"}),
    Route(
        "POST",
        "/api/create",
        {
            "model": "made",
            "from": "demo",
            "stream": False,
            "system": "Short.",
            "parameters": _OPTIONS,
            "messages": [{"role": "user", "content": "a"}],
            "license": ["free"],
            "files": {"a.gguf": "sha256:" + "0" * 64},
            "adapters": {"b.gguf": "sha256:" + "1" * 64},
        },
    ),
    Route("POST", "/api/copy", {"source": "demo", "destination": "made-too"}),
    Route("DELETE", "/api/delete", {"model": "made"}),
]


@dataclass(frozen=True)
class Odd:
    """One request with one odd value."""

    route: Route
    place: str
    """Keys to the field, with dots."""
    what: str
    body: bytes

    def __str__(self) -> str:
        return f"{self.route.method} {self.route.path} {self.place} = {self.what}"


_MARK = "\x01the value\x01"


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys to everything inside of a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from places(inner, (*before, key))


def requests(route: Route, further: Iterator[str] | list[str] = ()) -> Iterator[Odd]:  # type: ignore[assignment]
    """Every value in every field of a route, in those that the body does not have, too.

    Parameters
    ----------
    further : names of such fields.
    """
    fields = [*places(route.body), *((name,) for name in further if name not in route.body), ("unknown",), ()]
    for place in fields:
        body = copy.deepcopy(route.body)
        if place:
            inner: Any = body
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = _MARK
        whole = json.dumps(body if place else _MARK)
        stream = json.dumps({**body, "stream": True} if place != ("stream",) else body)
        templates = [whole, stream if place and route.path in STREAMING else whole]
        for number, (what, written) in enumerate(VALUES.items(), len(place)):
            shown = ".".join(map(str, place)) or "the body"
            yield Odd(route, shown, what, templates[number % 2].replace(json.dumps(_MARK), written).encode("utf-8"))
