"""Constraints on an answer's form and tokens, as OpenAI and other servers name them → options.

Enters: fields of a body. Leaves: keyword arguments of `Model.submit`, and the client's names for them, for errors.
At most one form: two would contradict each other, and choosing one would drop the other. Shared by chat
completions, completions and responses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field

from edge_runtime.errors import MessageError
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.loose import Loose

Options = dict[str, Any]
FORMS = ("schema", "json", "choices", "regex", "grammar")
"""Options of which an answer may have at most one."""


FormKind = Literal["text", "json_object", "json_schema"]


class JsonSchema(Loose):
    """The schema of an answer."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextFormat(JsonSchema):
    """Form of the answer, in the responses API."""

    type: FormKind = "text"
    description: str | None = None
    strict: bool | None = None

    def options(self) -> Options:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When the schema is missing.
        """
        expected = '{"type": "json_schema", "name": ..., "schema": {...}}'
        return form_options(self.type, self.schema_, "text.format", "text.format.schema", expected)


class ResponseFormat(Loose):
    """Form of the answer, in chat completions."""

    type: FormKind
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="The same without a name, as llama-server has it."
    )

    def options(self) -> Options:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When the schema is missing.
        """
        if self.type == "json_object" and self.schema_ is not None:
            return {"schema": self.schema_}
        schema = self.json_schema.schema_ if self.json_schema is not None else self.schema_
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        return form_options(self.type, schema, "response_format", "response_format.json_schema", expected)


def form_options(kind: FormKind, schema: dict[str, Any] | None, where: str, place: str, expected: str) -> Options:
    """Arguments of `Model.submit` for a form.

    Parameters
    ----------
    where : the field that asks for the form.
    place, expected : where its schema belongs, and an example, for the error.

    Raises
    ------
    RequestError
        When the schema is missing.
    """
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json": True}
    if schema is None:
        raise RequestError(f"{where} has no schema; expected {expected}.", place)
    return {"schema": schema}


class ConstraintFields(Loose):
    """Extensions of other servers that constrain an answer."""

    json_schema: Any = Field(None, description="Schema of the answer, as llama-server has it.")
    format: Any = Field(None, description="`json` or a schema, as Ollama has it.")
    grammar: Any = Field(None, description="GBNF, as llama-server has it; or an object, as TGI has it.")
    regex: str | None = Field(None, description="The whole answer matches it, as SGLang has it.")
    guided_json: Any = Field(None, description="Schema, as vLLM had it.")
    guided_choice: list[str] | None = Field(None, description="The answer is one of these, as vLLM had it.")
    guided_regex: str | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = Field(
        None, description="As vLLM has it: one of json, json_object, choice, regex, grammar."
    )
    min_tokens: int | None = Field(None, ge=0, description="Least number of tokens before the answer may end.")
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None

    def rule_options(self) -> Options:
        """Arguments of `Model.submit` about tokens."""
        found = {
            "min_tokens": self.min_tokens or None,
            "ignore_eos": self.ignore_eos or None,
            "stop_token_ids": self.stop_token_ids or None,
            "allowed_token_ids": self.allowed_token_ids,
        }
        return {name: value for name, value in found.items() if value is not None}

    def forms(self) -> Iterator[tuple[str, Options]]:
        """Fields that ask for a form, with the arguments of `Model.submit` they mean.

        Raises
        ------
        RequestError
            Names the field whose value is malformed.
        """
        for name, read in _READERS.items():
            value = getattr(self, name)
            if value is not None and (options := read(value, name)):
                yield name, options


def one_form(*found: tuple[str, Options]) -> tuple[str | None, Options]:
    """The only form asked for, and the field that asks for it.

    Raises
    ------
    RequestError
        When several fields ask for different forms.
    """
    wanted = [(name, options) for name, options in found if options]
    if not wanted:
        return None, {}
    for name, options in wanted[1:]:
        if options != wanted[0][1]:
            raise RequestError(
                f"{wanted[0][0]} and {name} were both given, but an answer has one form; leave one of them out.", name
            )
    return wanted[0]


def _schema(value: Any, where: str) -> Options:
    if isinstance(value, str):  # some clients send the schema as text
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f"{where} is text that is not JSON; expected a JSON schema.", where) from None
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is of type {type(value).__name__}; expected a JSON schema as an object.", where)
    return {"schema": dict(value)}


def _ollama_format(value: Any, where: str) -> Options:
    if value in ("", "json"):
        return {"json": True} if value else {}
    return _schema(value, where)


def _text(option: str) -> Callable[[Any, str], Options]:
    def read(value: Any, where: str) -> Options:
        if not isinstance(value, str):
            raise RequestError(f"{where} is of type {type(value).__name__}; expected a string.", where)
        return {option: value} if value else {}

    return read


def _choices(value: Any, where: str) -> Options:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RequestError(f"{where} is not a list of strings; expected the possible answers.", where)
    return {"choices": value}


def _grammar(value: Any, where: str) -> Options:
    """GBNF; or an object with a type and a value."""
    if not isinstance(value, Mapping):
        return _text("grammar")(value, where)
    read = {"json": _schema, "json_object": _schema, "regex": _text("regex")}.get(str(value.get("type")))
    if read is None or "value" not in value:
        raise RequestError(
            f'{where} is an object; expected GBNF as a string, or {{"type": "json" or "regex", "value": ...}}.', where
        )
    return read(value["value"], f"{where}.value")


def _structured(value: Mapping[str, Any], where: str) -> Options:
    """Read vLLM's object: one of the forms. Its options for writing JSON are not supported."""
    found = []
    for name, inner in value.items():
        if inner is None or inner is False:
            continue
        read = _STRUCTURED.get(name)
        if read is None:
            raise RequestError(
                f"{where} has {name[:40]!r}, which is unknown here; expected one of {', '.join(_STRUCTURED)}.",
                f"{where}.{name[:40]}",
            )
        found.append((f"{where}.{name}", read(inner, f"{where}.{name}")))
    _, options = one_form(*found)
    if not options:
        raise RequestError(f"{where} is empty; expected one of {', '.join(_STRUCTURED)}.", where)
    return options


def _json_object(value: Any, where: str) -> Options:
    if value is not True:
        raise RequestError(f"{where} is of type {type(value).__name__}; expected true or false.", where)
    return {"json": True}


_STRUCTURED: dict[str, Callable[[Any, str], Options]] = {
    "json": _schema,
    "json_object": _json_object,
    "choice": _choices,
    "regex": _text("regex"),
    "grammar": _text("grammar"),
}
_READERS: dict[str, Callable[[Any, str], Options]] = {
    "json_schema": _schema,
    "format": _ollama_format,
    "grammar": _grammar,
    "regex": _text("regex"),
    "guided_json": _schema,
    "guided_choice": _choices,
    "guided_regex": _text("regex"),
    "guided_grammar": _text("grammar"),
    "structured_outputs": _structured,
}


@contextmanager
def fields_as_sent(names: Mapping[str, str]) -> Iterator[None]:
    """Make the runtime's errors name the field that the client sent.

    Parameters
    ----------
    names : option of `Model.submit` → field of the request.
    """
    try:
        yield
    except MessageError as error:
        text = str(error)
        option = text.partition(" ")[0]
        if option in names:
            field = names[option]
            raise RequestError(field + text[len(option) :], field) from error
        form = next((names[name] for name in FORMS if name in names), None)
        if form is not None and text.startswith(("$", "The schema", "The pattern")):
            raise RequestError(f"{form}: {text}", form) from error
        raise
