"""What requests of chat completions and responses have in common, besides sampling.

Tools and their choice, reasoning, and pictures; each API has its own form for conversations and function
descriptions.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from edge_runtime.server.fields.constraints import Options
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.fields.sampling import Effort, SamplingFields
from edge_runtime.server.fields.tools import choose_tools, described, given, offered


class Reasoning(Loose):
    """Settings of reasoning."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Ignored: replies contain the reasoning itself."
    )


class ConversationFields(SamplingFields):
    """Fields of both."""

    flat_functions: ClassVar[bool]
    """Whether a function's name may be beside its type instead of inside `function`."""

    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning: Reasoning | None = Field(None, description="As in responses; Ollama accepts it in chats, too.")
    thinking_budget: int | None = Field(None, ge=0, description="Largest number of reasoning tokens.")
    max_slices: int | None = Field(None, ge=1, description="Largest number of cells per picture.")

    @property
    def max_calls(self) -> int | None:
        """1 if the client accepts one call at a time."""
        return 1 if self.parallel_tool_calls is False else None

    @property
    def effort(self) -> Effort | None:
        """How much the model should reason."""
        return self.reasoning.effort if self.reasoning is not None else None

    def offered_tools(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Functions in the engine's form, and sentences about tools that were left out.

        Raises
        ------
        RequestError
            Names the invalid tool.
        """
        flat = self.flat_functions
        return offered(self.tools or [], self.tool_choice, lambda tool, where: described(tool, where, flat=flat))

    def options(self) -> Options:
        """Arguments of `Model.submit`, without the route's own.

        Raises
        ------
        RequestError
            When tools are described or chosen in a way that cannot be used.
        """
        tools, choice = choose_tools(self.offered_tools()[0], self.tool_choice)
        return self.sampling_options() | given(tools=tools or None, tool_choice=choice, max_slices=self.max_slices)

    def prompt_options(self) -> Options:
        """The options that affect the prompt."""
        options = self.options()
        kept = {name: options[name] for name in PROMPT_OPTIONS if name in options}
        if options.get("tool_choice") == "none":
            kept.pop("tools", None)
        return kept


PROMPT_OPTIONS = ("thinking", "tools", "max_slices", "continue_final_message")
