"""What is asked of the engine: a prepared request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from edge_runtime.errors import MessageError
from edge_runtime.generation.sampling import SamplingOptions
from edge_runtime.generation.token_rules import TokenRules
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.prompt.build import Prompt
from edge_runtime.prompt.continuation import Begun
from edge_runtime.structured_output.constraint import AnswerForm
from edge_runtime.structured_output.text_form import TextForm


@dataclass(frozen=True)
class Request:
    """A prepared request."""

    prompt: Prompt
    groups: list[Group]
    """Slices behind `prompt.bounds`, one group for each."""
    digests: list[bytes]
    """Of the groups; see `pipeline.group_digest`."""
    sampling: SamplingOptions
    thinking: bool
    """Whether the prompt ends inside the reasoning."""
    max_tokens: int
    stop: Sequence[str] = ()
    thinking_budget: int | None = None
    """Tokens of reasoning after which it is ended."""
    repetition_check: bool = True
    """End an answer that goes in circles."""
    stop_in_reasoning: bool = False
    """Whether `stop` ends the reasoning too, and the answer with it."""
    n_alternatives: int | None = None
    """Of the log probabilities that are told with each token; None tells none."""
    n_beams: int = 1
    """More than one: the answer of a beam search."""
    adapter: str | None = None
    """Name of the LoRA adapter to compute with."""
    form: AnswerForm | TextForm | None = None
    """What the answer must look like."""
    tools: Sequence[str] = ()
    """Names of the functions that the model may call."""
    begun: Begun | None = None
    """The turn that the answer goes on with; it stands in the prompt."""
    rules: TokenRules | None = None
    """Which tokens may be chosen, and which end the answer; None: what the model writes."""
    scores_prompt: bool = False
    """Tell the log probabilities of the prompt's tokens, too, with `n_alternatives`; nothing of it is reused then."""
    is_prefetch: bool = False
    """Compute the prompt and nothing else, as long as nobody asks for anything; see `next_turn`."""
    shared: int = 0
    """Positions at the beginning that other chats have, too: system prompt and tools; see `beginnings`."""
    reuse: bool = True
    """Whether the prompt goes on behind a beginning that another request has computed."""

    def keys(self) -> list[Hashable]:
        """What stands at each position of the prompt: a token, or a place in a group's visual tokens."""
        keys: list[Hashable] = list(self.prompt.ids)
        if len(self.digests) != len(self.prompt.bounds):
            raise MessageError(
                f"The prompt has {len(self.prompt.bounds)} places for visual tokens, expected {len(self.digests)}; "
                "take out what looks like a picture's mark from the names of tools and their parameters."
            )
        for digest, (first, end) in zip(self.digests, self.prompt.bounds, strict=True):
            keys[first:end] = [(digest, i) for i in range(end - first)]
        return keys
