"""Tokens that the pictures of a conversation will take, before any of them is decoded.

A conversation that does not fit is refused with the size of each picture and what would help; or, on request, all its
pictures and video frames are cut into fewer cells, with one limit for all, until it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from edge_runtime.errors import MessageError, PromptTooLongError
from edge_runtime.inputs.clips import Clip, FramePart
from edge_runtime.inputs.image import picture_size
from edge_runtime.inputs.messages import ImagePart, Message, Part
from edge_runtime.inputs.slicing import Size, plan_slices
from edge_runtime.prompt.build import ImageLayout, Prompt, iter_images
from edge_runtime.prompt.context_shift import STEPS, Placed, cuts, without_oldest
from edge_runtime.weights.config import SlicingConfig

_MAX_LISTED = 6  # runs of pictures that an error lists


Build = Callable[[Sequence[Message], Sequence[Placed]], Prompt]


@dataclass(frozen=True)
class ContextLimits:
    """What the prompt must fit."""

    n_ctx: int
    """Positions of the context."""
    reserve_tokens: int
    """Positions to keep free for the answer, at most a quarter of the context."""
    visual: int | None = None
    """Maximum number of visual tokens."""
    tools: Callable[[], str] = lambda: ""
    """Describes the share of the tools, see `share_of_tools`."""

    @property
    def prompt(self) -> int:
        """Positions for the prompt."""
        return self.n_ctx - max(1, min(self.reserve_tokens, self.n_ctx // STEPS))


@dataclass(frozen=True)
class Measured:
    """A picture, or the first frame of a group, which stands for the whole group."""

    size: Size
    max_slices: int
    """Maximum number of cells that was asked for."""
    frames: int = 1
    of_video: bool = False
    has_own_limit: bool = False
    """A limit for all pictures does not apply to this one, nor to a video's frames."""

    def slices(self, config: SlicingConfig, max_cells: int) -> tuple[int, int]:
        """Number of slices, and of rows of cells, with at most `max_cells` cells."""
        plan = plan_slices(*self.size, config, min(self.max_slices, max_cells))
        return plan.n_slices, plan.grid[1]


class TokenBudget:
    """Tokens that a conversation's pictures take.

    Parameters
    ----------
    n_text : tokens of the prompt with one slice for each picture.
    """

    def __init__(self, pictures: Sequence[Measured], config: SlicingConfig, n_queries: int, n_text: int) -> None:
        self._pictures, self._config, self._queries, self._n_text = pictures, config, n_queries, n_text

    def visual(self, max_cells: int) -> list[int]:
        """Visual tokens of each picture with at most `max_cells` cells."""
        return [picture.slices(self._config, max_cells)[0] * self._queries for picture in self._pictures]

    def total(self, max_cells: int) -> int:
        """Tokens of the prompt: a cell has a tag on each side, rows are joined by a newline (`prompt.build`)."""
        n = self._n_text
        for picture in self._pictures:
            slices, rows = picture.slices(self._config, max_cells)
            n += (slices - 1) * (self._queries + 2) + max(0, rows - 1)
        return n

    @property
    def largest(self) -> int:
        """The maximum number of cells that any picture may be cut into."""
        return max(picture.max_slices for picture in self._pictures)

    def fits(self, max_cells: int, limits: ContextLimits) -> bool:
        """Whether the prompt fits, with space for an answer."""
        if limits.visual is not None and sum(self.visual(max_cells)) > limits.visual:
            return False
        return self.total(max_cells) <= limits.prompt

    def lowered(self, limits: ContextLimits) -> int | None:
        """The largest number of cells with which it fits; None if it does not fit with one."""
        return next((n for n in range(self.largest, 0, -1) if self.fits(n, limits)), None)

    def refusal(self, limits: ContextLimits) -> PromptTooLongError:
        """An error with the numbers, and what would help."""
        max_cells = self.largest
        limit = f"the context holds {limits.n_ctx}, one of them for the answer"
        if limits.visual is not None and sum(self.visual(1)) > limits.visual:
            limit = f"pictures may take {limits.visual} at most"
        return PromptTooLongError(
            f"The prompt has {self.total(max_cells)} tokens{limits.tools()}, but {limit}; "
            f"{sum(self.visual(max_cells))} are for {self._listed(max_cells)}. {self._advice(limits)}",
            self.total(max_cells),
            limits.n_ctx,
        )

    def _listed(self, max_cells: int) -> str:
        """What the pictures take, in order; neighbours of equal size are listed together."""
        moves = [picture.of_video for picture in self._pictures]
        n_pictures = moves.count(False)
        runs, last = [], 0
        for (of_video, tokens), run in groupby(zip(moves, self.visual(max_cells), strict=True)):
            n = len(list(run))
            if of_video:
                name = f"{_count(n, 'group')} of frames"
            else:
                last += n
                name = f"picture {last}" if n == 1 else f"pictures {last - n + 1} to {last}"
            runs.append(f"{name}: {tokens}{' each' if n > 1 else ''}")
        if len(runs) > _MAX_LISTED:
            runs[_MAX_LISTED:] = [f"and so on to picture {n_pictures}" if n_pictures else "and so on"]
        kinds = [_count(n_pictures, "picture")] * (n_pictures > 0) + ["videos"] * any(moves)
        return f"{' and '.join(kinds)} ({', '.join(runs)})"

    def _advice(self, limits: ContextLimits) -> str:
        """What would make the prompt fit."""
        max_cells = self.lowered(limits)
        if max_cells is not None and max_cells < self.largest:
            larger = [picture for picture in self._pictures if picture.max_slices > max_cells]
            alone = any(picture.of_video or picture.has_own_limit for picture in larger)
            option = "--fit" if alone else f"--max-slices {max_cells} or --fit"
            return f"They fit with {option}; as they are, with a larger --ctx."
        fewer = ["choose some of them (--pages)", "ask about one at a time (--each-page)"]
        if any(picture.of_video for picture in self._pictures):
            fewer = ["use fewer frames (--max-frames) or more in a group (--packing)"]
        return f"Uncut they take {sum(self.visual(1))}: {', '.join(fewer)}, shorten the text, or use a larger --ctx."


@dataclass(frozen=True)
class Budget:
    """How pictures are cut, and what to do when they take too many tokens.

    Parameters
    ----------
    max_slices : maximum number of cells per picture, where a part has no limit of its own; None takes the model's.
    fit : cut them into fewer cells; a number limits the visual tokens of all pictures together.
    only_last_turn : whether the turns before the last one may be dropped later (`context_shift`).
    """

    slicing: SlicingConfig
    n_queries: int
    max_slices: int | None
    pixel_limit: int
    fit: bool | int = False
    only_last_turn: bool = False

    def fit_slices(
        self,
        conversation: Sequence[Message],
        times: Sequence[Sequence[int]],
        build: Build,
        n_ctx: int,
        reserve_tokens: int,
        tools: Callable[[], str] = lambda: "",
    ) -> tuple[Sequence[Message], int | None]:
        """Check that a conversation fits the context, and cut its pictures into fewer cells if `fit` allows.

        Parameters
        ----------
        times : temporal ids of all pictures; a group of them shares one placeholder.
        build : makes a prompt from messages and placeholders.
        n_ctx, reserve_tokens : positions of the context, and those to keep free for the answer.
        tools : describes the share of the tools.

        Returns
        -------
        conversation, max_cells : the conversation, and the limit of cells its pictures are now cut into; None if
            nothing was lowered.

        Raises
        ------
        PromptTooLongError
            When it does not fit, with what each picture takes.
        MessageError, ImageError
            When `fit` has the wrong form, or a picture's header cannot be read.
        """
        visual = checked_fit(self.fit)
        pictures = self._measure(conversation, times)
        placed, index = [], 0
        for picture in pictures:
            placed.append(Placed(ImageLayout(index, (0, 0), picture.frames), [], []))
            index += picture.frames
        must_fit, left = conversation, placed
        if self.only_last_turn and (n_cuts := len(cuts(conversation, placed))) > 1:
            must_fit, left = without_oldest(conversation, placed, n_cuts - 1)
        if not left:
            return conversation, None
        n_text = len(build(must_fit, left).ids)
        tokens = TokenBudget(pictures[-len(left) :], self.slicing, self.n_queries, n_text)
        limits = ContextLimits(n_ctx, reserve_tokens, visual, tools)
        if not self.fit:
            if tokens.total(tokens.largest) >= n_ctx:
                raise tokens.refusal(limits)
            return conversation, None
        if tokens.fits(tokens.largest, limits):
            return conversation, None
        max_cells = tokens.lowered(limits) or tokens.lowered(ContextLimits(n_ctx, 1, visual))
        if max_cells is None:
            raise tokens.refusal(limits)
        lowering = _Lowering(max_cells, self)
        return [
            replace(message, parts=tuple(map(lowering.part, message.parts))) for message in conversation
        ], max_cells

    def limit(self, part: ImagePart) -> int:
        """Maximum number of cells that was asked for."""
        if isinstance(part, FramePart):
            return part.clip.options.max_slices
        return next(n for n in (part.max_slices, self.max_slices, self.slicing.max_slice_nums) if n is not None)

    def _measure(self, conversation: Sequence[Message], times: Sequence[Sequence[int]]) -> list[Measured]:
        parts, found, done = list(iter_images(conversation)), [], 0
        for group in times:
            part = parts[done]
            if isinstance(part, FramePart):
                found.append(Measured(part.clip.size, self.limit(part), len(group), of_video=True))
            else:
                size = picture_size(part.source, pixel_limit=self.pixel_limit)
                found.append(Measured(size, self.limit(part), len(group), has_own_limit=part.max_slices is not None))
            done += len(group)
        return found


@dataclass(frozen=True)
class _Lowering:
    """Parts of messages → parts that are cut into at most `max_cells` cells; frames of one video stay together."""

    max_cells: int
    budget: Budget
    _clips: dict[Clip, Clip] = field(default_factory=dict)

    def part(self, part: Part) -> Part:
        if isinstance(part, FramePart):
            if part.clip not in self._clips:
                self._clips[part.clip] = part.clip.cut_into(min(self.budget.limit(part), self.max_cells))
            return replace(part, clip=self._clips[part.clip])
        if isinstance(part, ImagePart):
            return replace(part, max_slices=min(self.budget.limit(part), self.max_cells))
        return part


def share_of_tools(build: Callable[[Sequence[dict[str, Any]]], Prompt], tools: Sequence[dict[str, Any]]) -> str:
    """Words for an error about a prompt that is too long: clients attach tools that their users never see.

    Parameters
    ----------
    build : makes the prompt of the system messages with tools; the size of tools does not depend on the turns.
    """
    if not tools:
        return ""
    n = len(build(tools).ids) - len(build([]).ids)
    return f", of which {n} tokens are the {_count(len(tools), 'tool') if len(tools) > 1 else 'tool'}"


def check_tools_fit(prompt: Prompt, n_ctx: int, tools: Callable[[], str]) -> None:
    """Refuse a prompt with tools that leaves no space for an answer.

    Parameters
    ----------
    tools : describes the share of the tools.

    Raises
    ------
    PromptTooLongError
        With the share of the tools.
    """
    if len(prompt.ids) + 1 > n_ctx:
        raise PromptTooLongError(
            f"The prompt has {len(prompt.ids)} tokens{tools()}, but the context holds {n_ctx}, one of them for the "
            "answer; send fewer tools (clients attach them to every chat with a model that supports tools; serve "
            "--tools off says that it does not), a shorter text, or use a larger --ctx.",
            len(prompt.ids),
            n_ctx,
        )


def _count(n: int, noun: str) -> str:
    return f"one {noun}" if n == 1 else f"{n} {noun}s"


def checked_fit(fit: object) -> int | None:
    """Visual tokens that `fit` allows, if it is a number.

    Raises
    ------
    MessageError
        When it is neither a number nor a bool.
    """
    if isinstance(fit, bool):
        return None
    if not isinstance(fit, int) or fit < 1:
        raise MessageError(f"fit is {fit!r}; expected True, False, or the maximum number of visual tokens.")
    return fit
