"""Tools as chat programs send them unasked with every chat: 36 functions, 26 KB of JSON."""

from __future__ import annotations

from typing import Any

KINDS = ("note", "memory", "calendar entry", "file", "knowledge base", "chat", "channel", "task", "web page")
ACTIONS = {
    "search": "Look for every {kind} whose title or text has the words of the query, newest first.",
    "view": "Read one {kind} as a whole, with its title, text, labels and the time it was last changed.",
    "create": "Make a new {kind}; ask the person before anything is written that was not asked for.",
    "update": "Change the title, text or labels of a {kind} that is there already; what is left out stays.",
}
PARAMETERS = {
    "query": (
        "string",
        "Words to look for in the title and in the text of the {kind}, several of them joined by and.",
    ),
    "identifier": ("string", "Identifier of the {kind}, as another function of this list has told it before."),
    "text": ("string", "The whole text of the {kind} in Markdown; headings and lists are kept as they are written."),
    "count": ("integer", "How many results are wanted at most; a small number is read faster than a large one."),
}


def many_tools(note: str = "") -> list[dict[str, Any]]:
    """The tools, in OpenAI's form.

    Parameters
    ----------
    note : stands at the end of the first one's description, so that they are other tools.
    """
    tools = []
    for kind in KINDS:
        for action, text in ACTIONS.items():
            properties: dict[str, Any] = {}
            for name, (type_name, meaning) in PARAMETERS.items():
                properties[name] = {"type": type_name, "description": meaning.format(kind=kind)}
            description = text.format(kind=kind) + (note if not tools else "")
            parameters = {"type": "object", "properties": properties, "required": ["query"]}
            function = {"name": f"{action}_{kind}".replace(" ", "_"), "description": description}
            tools.append({"type": "function", "function": {**function, "parameters": parameters}})
    return tools
