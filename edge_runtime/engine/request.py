"""What is asked of the engine: a prepared request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from edge_runtime.errors import MessageError
from edge_runtime.generation.sampling import GREEDY, SamplingOptions
from edge_runtime.generation.token_rules import TokenRules
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.build import Prompt
from edge_runtime.prompt.continuation import BegunTurn
from edge_runtime.structured_output.constraint import AnswerForm
from edge_runtime.structured_output.text_form import TextForm
from edge_runtime.structured_output.tools import function_names


@dataclass(frozen=True)
class Request:
    """A prepared request."""

    prompt: Prompt
    groups: list[Group]
    """Slices behind `prompt.bounds`, one group for each."""
    digests: list[bytes]
    """Of the groups; see `pipeline.group_digest`."""
    options: GenerationOptions
    """Checked, and as they hold for this prompt: `thinking` says whether it ends inside the reasoning, `max_tokens`
    is 0 where only the prompt is computed, and `thinking_budget` leaves a form the tokens that it needs."""
    sampling: SamplingOptions = GREEDY
    """How tokens of this answer are chosen; several answers to one prompt differ in the seed."""
    rules: TokenRules | None = None
    """Which tokens may be chosen, and which end the answer; None: what the model writes."""
    form: AnswerForm | TextForm | None = None
    """What the answer must look like."""
    begun: BegunTurn | None = None
    """The turn that the answer goes on with; it stands in the prompt."""
    scores_prompt: bool = False
    """Tell the log probabilities of the prompt's tokens, too, with `n_alternatives`; nothing of it is reused then."""
    is_prefetch: bool = False
    """Compute the prompt and nothing else, as long as nobody asks for anything; see `next_turn`."""
    shared: int = 0
    """Positions at the beginning that other chats have, too: system prompt and tools; see `cache.shared_prefixes`."""

    @property
    def n_alternatives(self) -> int | None:
        """Of the log probabilities that are told with each token; None tells none."""
        return self.options.top_logprobs if self.options.logprobs else None

    @property
    def tools(self) -> Sequence[str]:
        """Names of the functions that the model may call."""
        return function_names(self.options.tools)

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
