"""Renders a chat template in Jinja's immutable sandbox, in this process or as a process of its own.

The sandbox keeps a template from reaching anything, but not from computing: three nested loops, or a number to the
power of another, can run for ever without writing a character. So templates from model files are rendered in a
process that `templates` can end, with its own limits on memory and CPU time in case nobody is left to end it.

It runs as a module, in its `sandbox`: each line on stdin is a request, `{"template": ..., "context": {...}}`, each
line on stdout its result, `{"text": ...}` or `{"fault": "template" | "conversation", "error": ...}`; the first line
says that it is ready.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from edge_runtime.system import sandbox

MAX_RENDERED_CHARACTERS = 16 << 20
"""Beyond twice the characters of the conversation."""
MAX_S = 5.0
"""Per rendering; the official template takes a millisecond."""
MAX_BYTES = 1 << 30


class TemplateFault(Exception):  # noqa: N818 - a fault of one of two
    """A template that cannot be rendered, and whether the template or the conversation is at fault."""

    def __init__(self, fault: Literal["template", "conversation"], message: str) -> None:
        super().__init__(message)
        self.fault = fault


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """Compile a template from a model file: untrusted code, so only in Jinja's immutable sandbox."""
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        # As in transformers: Jinja's own tojson escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    # The filters, functions and loop controls that transformers offers to templates; llama.cpp has them, too.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template)
    except (TemplateSyntaxError, RecursionError, MemoryError) as error:
        why = f"is not valid Jinja ({error}); convert or download the model again"
        raise TemplateFault("template", why) from None


def render(template: str, context: dict[str, Any], check: Callable[[], None] = lambda: None) -> str:
    """Render a template.

    Parameters
    ----------
    check : called for every piece of the text; what it raises ends the work.

    Raises
    ------
    TemplateFault
    """
    from jinja2 import TemplateError

    compiled = _compile(template)
    text, length = [], 0
    most = MAX_RENDERED_CHARACTERS + 2 * _n_characters(context)
    try:
        for piece in compiled.generate(**context):
            check()
            text.append(piece)
            length += len(piece)
            if length > most:
                raise TemplateFault("template", "writes endlessly; use a file with the official template")
    except MemoryError:
        raise TemplateFault("template", "fills the memory; use a file with the official template") from None
    except (
        *(TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError),
    ) as error:
        raise TemplateFault("conversation", str(error)) from None
    return "".join(text)


def _n_characters(value: Any) -> int:
    """Characters of all texts inside a JSON value."""
    left, found = [value], 0
    while left:
        item = left.pop()
        if isinstance(item, str):
            found += len(item)
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            left += item
    return found


def main() -> None:
    """Answer requests until stdin ends."""
    import jinja2.sandbox  # noqa: F401 - before access to files is given up

    sandbox.limit_resources(MAX_BYTES)
    sandbox.give_up_files()
    sandbox.give_up_system_calls()
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sandbox.limit_time(MAX_S)
        try:
            reply = {"text": render(request["template"], request["context"])}
        except TemplateFault as error:
            reply = {"fault": error.fault, "error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
