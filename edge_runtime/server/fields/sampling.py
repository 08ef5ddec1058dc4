"""How tokens are chosen and how long an answer may be, in OpenAI's fields → arguments of `Model.submit`.

Common to chat completions, completions and responses. Source: openai-python's types; extensions of llama-server,
vLLM and Ollama that clients send in `extra_body`.
"""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from edge_runtime.generation.sampling import LARGEST_BIAS, MAX_SEED
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.constraints import FORMS, ConstraintFields, Options, one_form
from edge_runtime.server.fields.refused import Refused, check_fields
from edge_runtime.server.fields.thinking import THINKING_LEVELS
from edge_runtime.server.fields.tools import given

MAX_STOPS = 64
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS_WITHOUT_REASONING = ("none", "minimal")
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)]
Bias = dict[str, float | bool] | list[Any]


class SamplingFields(ConstraintFields):
    """How tokens are chosen, and constraints on them."""

    model_config = ConfigDict(extra="allow")  # `check_fields` judges them

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    repeat_penalty: float | None = Field(None, gt=0, description="The same, as llama-server has it.")
    repeat_last_n: int | None = Field(
        None, ge=-1, description="0 turns that penalty off; any other value covers the whole answer."
    )
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    logit_bias: Bias | None = Field(None, description="By token id, or pairs as in llama-server.")
    cache_prompt: bool | None = Field(None, description="False computes the whole prompt again, as in llama-server.")
    drafts: str | list[str] | None = Field(
        None,
        description="Whether next tokens are guessed, and from what; see `Model.chat`. No guess changes an answer.",
    )
    return_progress: bool | None = Field(
        None, description="Whether a stream reports prompt progress, as in llama-server."
    )
    timings_per_token: bool | None = Field(
        None, description="Whether a stream reports timings with each piece, as in llama-server."
    )

    @property
    def reports_progress(self) -> bool:
        """Whether a stream reports prompt progress."""
        return bool(self.stream and self.return_progress)

    def warnings(self, *tables: dict[str, Refused]) -> list[str]:
        """Sentences about unknown fields; fields that ask for what this server does not do are refused.

        Raises
        ------
        RequestError
            Names the first of the latter.
        """
        return check_fields(self.model_extra, *tables)

    def sampling_options(self) -> Options:
        """Arguments of `Model.submit` that all kinds of requests have in common.

        Raises
        ------
        RequestError
            When two fields contradict each other, or one has the wrong form.
        """
        penalty = self.repetition_penalty if self.repeat_penalty is None else self.repeat_penalty
        if None not in (self.repetition_penalty, self.repeat_penalty) and penalty != self.repetition_penalty:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty} and repeat_penalty {self.repeat_penalty}, "
                "which name the same number; leave one of them out.",
                "repeat_penalty",
            )
        return given(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=1.0 if self.repeat_last_n == 0 else penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed % MAX_SEED,
            stop=stops(self.stop),
            logit_bias=_bias(self.logit_bias),
            reuse=False if self.cache_prompt is False else None,
            drafts=self.drafts,
            **self.rule_options(),
        )

    def form(self, *others: tuple[str, Options]) -> tuple[Options, dict[str, str]]:
        """The form of the answer, and the client's name for it.

        Parameters
        ----------
        others : further fields that may ask for a form.

        Raises
        ------
        RequestError
            When there is more than one.
        """
        name, options = one_form(*others, *self.forms())
        return options, {} if name is None else {option: name for option in FORMS if option in options}

    def names(self) -> dict[str, str]:
        """Options of `Model.submit` → fields of this request, for errors."""
        found = {name: name for name in type(self).model_fields if getattr(self, name) is not None}
        if self.repeat_penalty is not None:
            found["repetition_penalty"] = "repeat_penalty"
        return found


def stops(stop: str | list[str] | None) -> list[str] | None:
    """Stop strings as a list."""
    return [stop] if isinstance(stop, str) else stop


def _bias(bias: Bias | None) -> dict[str, float] | None:
    """Biases by token id; false forbids a token."""
    if bias is None:
        return None
    pairs = [*bias.items()] if isinstance(bias, dict) else [*bias]
    found: dict[str, float] = {}
    for pair in pairs:
        token_id, value = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        if (
            not isinstance(value, int | float)
            or value is True
            or isinstance(token_id, bool)
            or not (str(token_id).isascii() and str(token_id).isdecimal())
        ):
            raise RequestError(
                f'logit_bias has {str(pair)[:60]}; expected token ids with numbers, such as {{"17": -100}}; false '
                "forbids a token. POST /tokenize returns the ids of a text.",
                "logit_bias",
            )
        if abs(value) > sys.float_info.max:  # a whole number of hundreds of digits
            value = math.inf
        found[str(token_id)] = -LARGEST_BIAS if value is False else float(value)
    return found


def length(*fields: tuple[str, int | None]) -> tuple[int | None, str | None]:
    """The token limit, the first of the fields that is given, and its name; negative numbers mean no limit."""
    for name, value in fields:
        if value is not None:
            return (None if value < 0 else value), name
    return None, None


def reasoning_options(effort: Effort | None, budget: int | None, switch: bool | None = None) -> Options:
    """Arguments of `Model.submit` about reasoning.

    Parameters
    ----------
    effort : Ollama's levels limit the reasoning as in Ollama, higher ones do not; None turns reasoning off.
    budget : limit of tokens, if the client gave one.
    switch : the template's switch, which overrides the effort.
    """
    thinking = effort not in (None, *EFFORTS_WITHOUT_REASONING) if switch is None else switch
    limit = THINKING_LEVELS.get(effort) if effort is not None and thinking else None
    return given(thinking=thinking, thinking_budget=budget if budget is not None else limit)
