"""A conversation that ends with the assistant's turn → a prompt that the answer continues.

The answer continues that turn, as in llama-server, vLLM, Ollama and Anthropic's API (where it is called prefill): the
prompt is what the template writes to ask for an answer, followed by the turn's text. The turn itself is not rendered,
so no template can close it, cut it or move it.

- Text: the answer continues it. Reasoning that comes with it is written before it, closed; without reasoning none is
  generated, whether or not the model is asked to think, because thinking comes first.
- Reasoning only: it is continued if the model thinks; otherwise it is closed, and the answer starts.
- Nothing: the turn is left out.

With two such turns it is not clear which one to continue and where the first one ends; like llama-server, we refuse
them, unless the last one is asked for (`continue_final_message`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import THINK, THINK_END, Message

ASSISTANT = "assistant"
_BLOCK_AT_END = re.compile(rf"{re.escape(THINK)}\s*(?:{re.escape(THINK_END)}\s*)?\Z")


@dataclass(frozen=True)
class BegunTurn:
    """The turn that an answer continues."""

    content: str
    reasoning: str = ""
    is_reasoning: bool = False
    """Whether the answer continues inside the reasoning."""
    has_thought: bool = False
    """Whether the turn says that reasoning has ended, even if it is empty."""


def find_begun_turn(
    conversation: Sequence[Message], wanted: bool | None, *, thinking: bool, raw: bool = False
) -> tuple[list[Message], BegunTurn | None]:
    """Find the turn that the answer continues.

    Parameters
    ----------
    wanted : see `pipeline.PromptOptions.continue_final_message`.
    thinking : whether the model is asked to reason.
    raw : whether the text is the prompt itself; then there are no turns.

    Returns
    -------
    conversation, begun : the turn, or None, is the last of the messages, which then holds its text as one part.

    Raises
    ------
    MessageError
        When there is nothing to continue.
    """
    messages = list(conversation)
    last = messages[-1]
    if raw:
        if wanted:
            raise MessageError(
                "continue_final_message was given for a raw prompt, which has no turns; the answer continues it "
                "anyway: leave one of the two out."
            )
        return messages, None
    if last.role != ASSISTANT:
        if wanted:
            raise MessageError(
                f"continue_final_message was given, but the last message has the role {last.role}; expected the "
                "assistant's, with the start of its answer."
            )
        return messages, None
    if wanted is False:
        return messages, None
    if wanted is None and [message.role for message in messages[-2:]] == [ASSISTANT, ASSISTANT]:
        raise MessageError(
            "Cannot have 2 or more assistant messages at the end of the list: an answer continues one. Join them, or "
            "add a question after them."
        )
    if last.tool_calls:
        raise MessageError(
            "The last message is the assistant's and holds tool calls, after which no answer can continue; append "
            "their results (role tool), or start a new turn with continue_final_message=False."
        )
    if not all(isinstance(part, str) for part in last.parts):
        raise MessageError(
            "The last message is the assistant's, which the answer continues, and holds a picture or a document; "
            "expected text, or continue_final_message=False to start a new turn after it."
        )
    begun = _begun(last, thinking)
    if begun is None:
        if not messages[1:]:
            raise MessageError("The conversation is one empty message of the assistant; expected a question.")
        return messages[:-1], None
    return [*messages[:-1], replace(last, parts=(begun.content,), reasoning=begun.reasoning or None)], begun


def _begun(last: Message, thinking: bool) -> BegunTurn | None:
    """The start of an answer in a turn of text; None when it is empty."""
    content, reasoning = "".join(str(part) for part in last.parts), last.reasoning or ""
    has_thought = last.has_thought
    opening = content.lstrip()
    if not reasoning and not has_thought and opening.startswith(THINK):
        if not thinking:
            raise MessageError(
                f"The last message starts reasoning with {THINK} and does not end it, but thinking is off; turn "
                f"thinking on, or end the reasoning with {THINK_END}."
            )
        content, reasoning = "", opening.removeprefix(THINK).lstrip("\n")
    if not content and not reasoning and not has_thought:
        return None
    is_reasoning = thinking and not content and not has_thought
    return BegunTurn(content, reasoning, is_reasoning, has_thought)


def render_continuation(
    begun: BegunTurn,
    messages: Sequence[dict[str, Any]],
    render: Callable[[Sequence[dict[str, Any]], bool], str],
    mark: str,
) -> str:
    """Write a prompt that ends inside the turn.

    Parameters
    ----------
    messages : as the template takes them, including the turn, whose guarded text is written.
    render : applies the template to messages; its second argument says whether to ask for an answer after them.
    mark : a character that occurs nowhere in the conversation.

    Raises
    ------
    MessageError
        When the template refuses the conversation.
    """
    asked = render(messages[:-1], True) if messages[1:] else _lone_opening(render, mark)
    content = messages[-1]["content"]
    reasoning = messages[-1].get("reasoning_content") or ""
    block = _BLOCK_AT_END.search(asked)
    head = asked[: block.start()] if block else asked
    if begun.is_reasoning:
        return f"{head}{THINK}\n{reasoning}"
    if reasoning or begun.has_thought or (block and THINK_END not in block[0]):
        thought = reasoning.strip("\n")
        return f"{head}{THINK}\n{thought}\n{THINK_END}\n\n{content}"
    return f"{asked}{content}"


def _lone_opening(render: Callable[[Sequence[dict[str, Any]], bool], str], mark: str) -> str:
    """How a template asks for the first turn; most templates read the first message, so there must be one."""
    place = mark + mark
    before, found, _ = render([{"role": ASSISTANT, "content": place}], False).partition(place)
    if not found:
        raise MessageError("The model's chat template drops the assistant's message; add a question before it.")
    block = _BLOCK_AT_END.search(before)
    asked = _BLOCK_AT_END.search(render([{"role": "user", "content": place}], True))
    return before[: block.start() if block else None] + (asked[0] if asked else "")
