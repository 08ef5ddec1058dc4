"""Questions with a name: `ocr`, `markdown`, `table` and `caption`.

`ocr` and the form of `markdown` (a role, what to keep, nothing but the text, all of it before the pages) follow the
official recipes for MiniCPM-V 4.5 (MiniCPM-V-CookBook, "OCR" and "PDF parsing"), which otherwise use `chat` as it is.
There is no official recipe for tables and captions; those are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import Message


@dataclass(frozen=True)
class Preset:
    """A question that is often asked."""

    text: str
    stands_first: bool = False
    """Whether it comes before the pictures. Pages that are asked about one by one then share a prefix."""
    transcribes: bool = False
    """Whether the answer is mostly what a page says of its own text."""


PRESETS = {
    "ocr": Preset("What is the text in the picture?", transcribes=True),
    "markdown": Preset(
        "You are an OCR assistant. Read all text that is visible in the picture and write it down as Markdown, in "
        "the order in which a person would read it. Keep as much of its form as Markdown can show:\n\n"
        "- paragraphs and line breaks\n"
        "- headings of every level\n"
        "- tables, lists and numbered items\n"
        "- formulas and special characters\n\n"
        "Answer with the text in Markdown alone. Add nothing of your own: no remarks, no explanation, no summary.",
        stands_first=True,
        transcribes=True,
    ),
    "table": Preset(
        "Write down every table in the picture as a Markdown table, with all of its rows and columns and with the "
        "text of its cells as it stands there. Leave the cells empty that are empty. Answer with the tables alone.",
        transcribes=True,
    ),
    "caption": Preset("Describe the picture in one or two sentences that could stand below it as a caption."),
}


def preset_named(name: str) -> Preset:
    """The preset of a name.

    Raises
    ------
    MessageError
        When there is none.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise MessageError(f"There is no preset {name!r}; expected one of {', '.join(PRESETS)}.")
    return preset


def with_preset(conversation: Sequence[Message], name: str) -> list[Message]:
    """Ask a preset's question in the user's last message; other text in that message is kept, after it.

    Raises
    ------
    MessageError
        When there is no such preset, or no message of the user.
    """
    preset = preset_named(name)
    last = max((i for i, message in enumerate(conversation) if message.role == "user"), default=None)
    if last is None:
        raise MessageError(f"The preset {name} needs a message of the user, but there is none; add a picture.")
    parts = conversation[last].parts
    texts = tuple(part for part in parts if isinstance(part, str))
    first_text = next((i for i, part in enumerate(parts) if isinstance(part, str)), len(parts))
    place = 0 if preset.stands_first else first_text if texts else len(parts)
    asked = replace(conversation[last], parts=(*parts[:place], preset.text, *parts[place:]))
    return [*conversation[:last], asked, *conversation[last + 1 :]]
