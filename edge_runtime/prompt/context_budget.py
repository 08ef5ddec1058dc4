"""Tokens that the pictures of a conversation will take, before any of them is decoded.

A conversation that cannot fit is refused with what each picture takes and what would help; or, when that is asked
for, all its pictures, and the frames of its videos, are cut into fewer cells, the same most for each, until it fits.
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

_MAX_LISTED = 6  # runs of pictures in an error


Build = Callable[[Sequence[Message], Sequence[Placed]], Prompt]


@dataclass(frozen=True)
class Room:
    """What the prompt must fit into."""

    n_ctx: int
    """Positions of the context."""
    answer: int
    """Positions that are to stay free for the answer; at most a quarter of the context does."""
    visual: int | None = None
    """Most visual tokens."""
    tools: Callable[[], str] = lambda: ""
    """Tells the share of the tools, see `share_of_tools`."""

    @property
    def prompt(self) -> int:
        """Positions for the prompt."""
        return self.n_ctx - max(1, min(self.answer, self.n_ctx // STEPS))


@dataclass(frozen=True)
class Measured:
    """A picture, or the first frame of a group, which the others of the group follow."""

    size: Size
    max_slices: int
    """Most cells that were asked for."""
    frames: int = 1
    of_video: bool = False
    has_own_limit: bool = False
    """A limit for all pictures is none for this one; nor is it for a video's frames."""

    def slices(self, config: SlicingConfig, most: int) -> tuple[int, int]:
        """Number of slices, and of rows of cells, with at most `most` cells."""
        plan = plan_slices(*self.size, config, min(self.max_slices, most))
        return plan.n_slices, plan.grid[1]


class Reckoning:
    """What a conversation's pictures take.

    Parameters
    ----------
    n_text : tokens of the prompt with one slice for each picture.
    """

    def __init__(self, pictures: Sequence[Measured], config: SlicingConfig, n_queries: int, n_text: int) -> None:
        self._pictures, self._config, self._queries, self._n_text = pictures, config, n_queries, n_text

    def visual(self, most: int) -> list[int]:
        """Visual tokens of each picture with at most `most` cells."""
        return [picture.slices(self._config, most)[0] * self._queries for picture in self._pictures]

    def total(self, most: int) -> int:
        """Tokens of the prompt: a cell stands between two marks, rows are joined by a newline (`prompt`)."""
        n = self._n_text
        for picture in self._pictures:
            slices, rows = picture.slices(self._config, most)
            n += (slices - 1) * (self._queries + 2) + max(0, rows - 1)
        return n

    @property
    def largest(self) -> int:
        """The most cells any picture may be cut into."""
        return max(picture.max_slices for picture in self._pictures)

    def fits(self, most: int, room: Room) -> bool:
        """Whether the prompt fits, an answer of some length with it."""
        if room.visual is not None and sum(self.visual(most)) > room.visual:
            return False
        return self.total(most) <= room.prompt

    def lowered(self, room: Room) -> int | None:
        """The most cells with which it fits; None if it does not with one."""
        return next((most for most in range(self.largest, 0, -1) if self.fits(most, room)), None)

    def refusal(self, room: Room) -> PromptTooLongError:
        """An error with the numbers, and what would help."""
        most = self.largest
        limit = f"the context holds {room.n_ctx}, one of them for the answer"
        if room.visual is not None and sum(self.visual(1)) > room.visual:
            limit = f"pictures are to take {room.visual} at most"
        return PromptTooLongError(
            f"The prompt has {self.total(most)} tokens{room.tools()}, but {limit}; {sum(self.visual(most))} are for "
            f"{self._told(most)}. {self._advice(room)}",
            self.total(most),
            room.n_ctx,
        )

    def _told(self, most: int) -> str:
        """What the pictures take, in order; neighbours that take the same are told together."""
        moves = [picture.of_video for picture in self._pictures]
        n_pictures = moves.count(False)
        runs, last = [], 0
        for (of_video, tokens), run in groupby(zip(moves, self.visual(most), strict=True)):
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

    def _advice(self, room: Room) -> str:
        """What would help, and does."""
        most = self.lowered(room)
        if most is not None and most < self.largest:
            larger = [picture for picture in self._pictures if picture.max_slices > most]
            alone = any(picture.of_video or picture.has_own_limit for picture in larger)
            option = "--fit" if alone else f"--max-slices {most} or --fit"
            return f"They fit with {option}; as they are, with a larger --ctx."
        fewer = ["choose some of them (--pages)", "ask about one at a time (--each-page)"]
        if any(picture.of_video for picture in self._pictures):
            fewer = ["look at fewer frames (--max-frames) or more in a group (--packing)"]
        return f"Uncut they take {sum(self.visual(1))}: {', '.join(fewer)}, shorten the text, or use a larger --ctx."


@dataclass(frozen=True)
class Budget:
    """How pictures are cut, and what is done when they take too much.

    Parameters
    ----------
    max_slices : most cells per picture, where a part has no limit of its own; None takes the model's.
    fit : cut them into fewer cells; a number is the most visual tokens they may take together.
    only_last_turn : whether the turns before the last one may be left out later (`overflow`).
    """

    slicing: SlicingConfig
    n_queries: int
    max_slices: int | None
    pixel_limit: int
    fit: bool | int = False
    only_last_turn: bool = False

    def settle(
        self,
        conversation: Sequence[Message],
        times: Sequence[Sequence[int]],
        build: Build,
        n_ctx: int,
        room: int,
        tools: Callable[[], str] = lambda: "",
    ) -> tuple[Sequence[Message], int | None]:
        """Hold a conversation against the context.

        Parameters
        ----------
        times : temporal ids of all pictures; a group of them shares one placeholder.
        build : makes the prompt of messages and placeholders.
        n_ctx, room : positions of the context, and those to be kept free for the answer.
        tools : tells the share of the tools.

        Returns
        -------
        conversation, most : the conversation, and the most cells its pictures are cut into now; None where nothing
            was lowered.

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
        reckoning = Reckoning(pictures[-len(left) :], self.slicing, self.n_queries, n_text)
        space = Room(n_ctx, room, visual, tools)
        if not self.fit:
            if reckoning.total(reckoning.largest) >= n_ctx:
                raise reckoning.refusal(space)
            return conversation, None
        if reckoning.fits(reckoning.largest, space):
            return conversation, None
        most = reckoning.lowered(space) or reckoning.lowered(Room(n_ctx, 1, visual))
        if most is None:
            raise reckoning.refusal(space)
        lowering = _Lowering(most, self)
        return [replace(message, parts=tuple(map(lowering.part, message.parts))) for message in conversation], most

    def limit(self, part: ImagePart) -> int:
        """Most cells that were asked for."""
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
    """Parts of messages → parts that are cut into no more than `most` cells; frames of one video stay together."""

    most: int
    budget: Budget
    _clips: dict[Clip, Clip] = field(default_factory=dict)

    def part(self, part: Part) -> Part:
        if isinstance(part, FramePart):
            if part.clip not in self._clips:
                self._clips[part.clip] = part.clip.cut_into(min(self.budget.limit(part), self.most))
            return replace(part, clip=self._clips[part.clip])
        if isinstance(part, ImagePart):
            return replace(part, max_slices=min(self.budget.limit(part), self.most))
        return part


def share_of_tools(build: Callable[[Sequence[dict[str, Any]]], Prompt], tools: Sequence[dict[str, Any]]) -> str:
    """Words for an error about a prompt that is too long: clients attach tools of which nobody has seen one.

    Parameters
    ----------
    build : makes the prompt of the system prompts with tools; what they take does not depend on the turns.
    """
    if not tools:
        return ""
    n = len(build(tools).ids) - len(build([]).ids)
    return f", of which {n} tokens are the {_count(len(tools), 'tool') if len(tools) > 1 else 'tool'}"


def check_room_beside_tools(prompt: Prompt, n_ctx: int, told: Callable[[], str]) -> None:
    """Refuse a prompt with tools that leaves no room for an answer.

    Parameters
    ----------
    told : tells the share of the tools.

    Raises
    ------
    PromptTooLongError
        With what the tools take.
    """
    if len(prompt.ids) + 1 > n_ctx:
        raise PromptTooLongError(
            f"The prompt has {len(prompt.ids)} tokens{told()}, but the context holds {n_ctx}, one of them for the "
            "answer; send fewer tools (clients attach them to every chat of a model that takes tools; serve --tools "
            "off says that it takes none), a shorter text, or use a larger --ctx.",
            len(prompt.ids),
            n_ctx,
        )


def _count(n: int, noun: str) -> str:
    return f"one {noun}" if n == 1 else f"{n} {noun}s"


def checked_fit(fit: object) -> int | None:
    """Visual tokens that `fit` allows, where it is a number of them.

    Raises
    ------
    MessageError
        When it is neither that nor a truth value.
    """
    if isinstance(fit, bool):
        return None
    if not isinstance(fit, int) or fit < 1:
        raise MessageError(f"fit is {fit!r}; expected True, False, or the most tokens that pictures may take.")
    return fit
