"""A prepared request, as the engine takes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
    """A prepared request, as the engine takes it."""

    prompt: Prompt
    groups: list[Group]
    """Slices for `prompt.bounds`, one group for each."""
    digests: list[bytes]
    """Of the groups; see `pipeline.group_digest`."""
    options: GenerationOptions
    """Checked, and adapted to this prompt: `thinking` says whether it ends inside the reasoning, `max_tokens`
    is 0 if only the prompt is computed, and `thinking_budget` leaves a form the tokens that it needs."""
    sampling: SamplingOptions = GREEDY
    """How tokens of this answer are chosen; several answers to one prompt differ in the seed."""
    rules: TokenRules | None = None
    """Which tokens may be chosen, and which end the answer; None: the model is free."""
    form: AnswerForm | TextForm | None = None
    """What the answer must look like."""
    begun: BegunTurn | None = None
    """The turn that the answer continues; it is part of the prompt."""
    expected: tuple[Sequence[int], ...] = ()
    """Tokens of texts that the answer probably is, with changes."""
    scores_prompt: bool = False
    """Report log probabilities of the prompt's tokens, too, with `n_alternatives`; then nothing is reused."""
    is_prefetch: bool = False
    """Compute the prompt and nothing else, while the engine is idle; see `next_turn`."""
    shared: int = 0
    """Leading positions that other chats have, too: system prompt and tools; see `cache.shared_prefixes`."""

    @property
    def n_alternatives(self) -> int | None:
        """Alternatives reported with each token's log probability; None: no log probabilities."""
        return self.options.top_logprobs if self.options.logprobs else None

    @property
    def gives_way(self) -> Callable[[], bool] | None:
        """Whether the request waits although no other one is here; None: it takes its turn. See `giving_way`."""
        return self.options.gives_way

    @property
    def tools(self) -> Sequence[str]:
        """Names of the functions that the model may call."""
        return function_names(self.options.tools)

    def keys(self) -> list[Hashable]:
        """What is at each position of the prompt: a token, or a place in a group's visual tokens."""
        keys: list[Hashable] = list(self.prompt.ids)
        if len(self.digests) != len(self.prompt.bounds):
            raise MessageError(
                f"The prompt has {len(self.prompt.bounds)} places for visual tokens, expected {len(self.digests)}; "
                "take out what looks like a picture's mark from the names of tools and their parameters."
            )
        for digest, (first, end) in zip(self.digests, self.prompt.bounds, strict=True):
            keys[first:end] = [(digest, i) for i in range(end - first)]
        return keys
