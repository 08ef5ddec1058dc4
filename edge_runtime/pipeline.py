"""The whole data flow as one readable function. Start here.

    messages ─ parse_messages ─┬─ documents ─ with_pages ─┐
                               ├─ pictures ───────────────┴─ load_image ─ slice_image ─ groups ──────────┐
                               ├─ videos ─ choose ─ parts for frames, groups that decode themselves ─────┤
                               └─ text + layouts ─ build_prompt ─ ids + bounds ──────────────────────────┴─ Request

What follows happens on the engine's thread (`engine`): groups ─ vision ─ resampler ─ visual tokens; ids ─ embedding
rows; both become one stream of embeddings ─ decoder ─ sampler ─ pieces of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.cache.shared_prefixes import Beginnings
from edge_runtime.errors import MessageError
from edge_runtime.inputs.clips import FramePart, expand_videos, group_ids
from edge_runtime.inputs.documents import DocumentOptions, with_pages
from edge_runtime.inputs.image import PIXEL_LIMIT
from edge_runtime.inputs.messages import ImagePart, Message, checked_max_slices, parse_messages
from edge_runtime.inputs.opener import InThisProcess, Opener, cut_source
from edge_runtime.inputs.presets import with_preset
from edge_runtime.inputs.slice_groups import Group, LazyGroup, LoadedGroup
from edge_runtime.inputs.slicing import Size, Slice, SlicePlan, plan_slices
from edge_runtime.inputs.video.frame_choice import VideoLimits, check_groups
from edge_runtime.prompt.build import ImageLayout, Prompt, build_prompt, iter_images
from edge_runtime.prompt.context_budget import Budget, check_room_beside_tools, share_of_tools
from edge_runtime.prompt.context_shift import Placed, fit
from edge_runtime.prompt.continuation import Begun, find_begun
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.structured_output.tools import checked_tools
from edge_runtime.weights.config import SlicingConfig


@dataclass(frozen=True, kw_only=True)
class PromptOptions(DocumentOptions):
    """How messages become a prompt."""

    thinking: bool = False
    max_slices: int | None = None
    """Most cells per picture; None takes the model's limit."""
    use_image_id: bool | None = None
    """Whether pictures are numbered; None takes the model's setting, but beside a video none is, as officially."""
    temporal_ids: Sequence[Sequence[int]] | None = None
    """Groups of frame times in units of 0.1 s that cover all pictures in order; -1 marks a still picture."""
    tools: Sequence[dict[str, Any]] = ()
    """Functions the model is told of, in OpenAI's form."""
    raw: bool = False
    """Take the text as the prompt, without the chat template."""
    prompt_ids: Sequence[int] | None = None
    """Token ids that are the prompt as they stand; with `raw`, in the place of messages."""
    pixel_limit: int = PIXEL_LIMIT
    video_limits: VideoLimits = VideoLimits()  # noqa: RUF009 - frozen
    context_shift: bool = False
    """Leave out the oldest turns of a conversation that does not fit, rather than refuse it."""
    fit: bool | int = False
    """Cut all pictures into fewer cells until the conversation fits; a number: until they take so many tokens."""
    preset: str | None = None
    """Name of a question to be asked, see `presets`."""
    continue_final_message: bool | None = None
    """Whether the answer goes on with the last message, where that is the assistant's: None does (see
    `continuation`), True insists that it is the assistant's, False begins a new turn behind it."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PromptOptions:
        """Take keyword arguments of `Model.chat`; an unknown one is a TypeError, as Python's own."""
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise TypeError(f"chat() got an unexpected keyword argument {unknown[0]!r}")
        return cls(**options)


@dataclass(frozen=True)
class Prepared:
    """A conversation ready for the engine."""

    prompt: Prompt
    groups: list[Group]
    """Slices behind each run of visual tokens."""
    digests: list[bytes] = field(default_factory=list)
    """One for each group; groups with equal digests have equal visual tokens."""
    slices: list[list[int]] = field(default_factory=list)
    """[width, height] of every slice, in order."""
    pictures: list[list[int]] = field(default_factory=list)
    """[width, height] of every picture and video frame, upright, in order."""
    videos: list[dict[str, Any]] = field(default_factory=list)
    """What is told of each video; see `Answer.videos`."""
    dropped_turns: int = 0
    """Oldest turns that were left out."""
    fitted_slices: int | None = None
    """Most cells per picture that `fit` has left; None where nothing was lowered."""
    begun: Begun | None = None
    """The turn that the answer goes on with."""
    with_more: Callable[[Sequence[Message]], Prompt] | None = None
    """The prompt that this conversation would have with further messages, without pictures, behind it; the whole
    turn takes the place of one that was begun."""
    shared: int = 0
    """Positions at the beginning of the prompt that other chats have, too; see `beginnings`."""


def prepare(
    messages: str | Sequence[Any],
    options: PromptOptions,
    *,
    slicing: SlicingConfig,
    tokenizer: Tokenizer,
    n_queries: int,
    template: str,
    n_ctx: int = 0,
    room: int = 0,
    refuse: bool = False,
    beginnings: Beginnings | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
    on_look: Callable[[float], None] = lambda share: None,
    opener: Opener | None = None,
) -> Prepared:
    """Turn a conversation into a prompt and the slices behind it.

    Parameters
    ----------
    n_queries : visual tokens per slice.
    n_ctx, room : positions of the context, and those to be kept free; for `context_shift` and `fit`.
    refuse : refuse what does not fit before pictures are decoded.
    beginnings : tells what other chats begin with, too; None: that is not asked for.
    on_image : called with (pictures decoded or pages drawn, all of them); what it raises ends the work, as with
        `on_look`.
    on_look : called often with the share of the videos whose index was made.
    opener : opens documents, pictures and videos; None: this process does.

    Raises
    ------
    MessageError, ImageError
        When the conversation, a document, a picture or a video cannot be used; nothing was computed then.
    PromptTooLongError
        When it does not fit, with `refuse` or `fit`.
    """
    checked_max_slices(options.max_slices)
    checked_tools(options.tools, "auto")
    if options.prompt_ids is not None:
        return Prepared(_prompt_of_ids(options, tokenizer), [])
    conversation: Sequence[Message] = parse_messages(messages)
    conversation, begun = find_begun(
        conversation, options.continue_final_message, thinking=options.thinking, raw=options.raw
    )
    if options.preset is not None:
        conversation = with_preset(conversation, options.preset)
    opener = opener or InThisProcess()
    conversation = with_pages(conversation, options, slicing, options.max_slices, opener.part)
    conversation = expand_videos(conversation, slicing, options.video_limits, on_look, opener.video)
    parts = list(iter_images(conversation))
    times = group_ids(parts, options.temporal_ids)
    check_groups(times, len(parts))
    has_video = any(isinstance(part, FramePart) for part in parts)
    numbered = slicing.use_image_id and not has_video if options.use_image_id is None else options.use_image_id

    def build(
        messages: Sequence[Message],
        pictures: Sequence[Placed],
        begun: Begun | None = begun,
        tools: Sequence[dict[str, Any]] = options.tools,
    ) -> Prompt:
        return build_prompt(
            messages,
            [item.layout for item in pictures],
            tokenizer,
            n_queries=n_queries,
            template=template,
            thinking=options.thinking,
            use_image_id=numbered,
            tools=tools,
            raw=options.raw,
            begun=begun,
            # Turns may go and pictures become smaller: then it is not known yet how much is too much.
            most_tokens=n_ctx - 1 if refuse and n_ctx and not (options.context_shift or options.fit) else None,
        )

    def told() -> str:
        few = [*(message for message in conversation if message.role == "system"), Message("user", ("?",))]
        return share_of_tools(lambda tools: build(few, [], None, tools), options.tools)

    fitted: int | None = None
    if refuse or options.fit:
        budget = Budget(
            slicing, n_queries, options.max_slices, options.pixel_limit, options.fit, options.context_shift
        )
        conversation, fitted = budget.settle(conversation, times, build, n_ctx, room, told)
        parts = list(iter_images(conversation))

    placed: list[Placed] = []
    pictures: list[list[int]] = []
    done = 0
    for ids in times:
        found, sizes = _place(parts[done : done + len(ids)], ids, done, options, slicing)
        placed.append(found)
        pictures += sizes
        done += len(ids)
        on_image(done, len(parts))

    left: Sequence[Placed] = placed
    if options.context_shift:
        prompt, left, n_dropped = fit(build, conversation, placed, n_ctx, room)
    else:
        prompt, n_dropped = build(conversation, placed), 0
    if not prompt.ids:
        raise MessageError(
            "The prompt is empty: the model's chat template makes nothing of these messages; expected text for the "
            "model to go on with. Use a file with the official template, or send a raw prompt."
        )
    if refuse and options.tools:
        check_room_beside_tools(prompt, n_ctx, told)
    known = conversation if begun is None else conversation[:-1]
    shared = 0
    if beginnings is not None and not options.raw:
        shared = beginnings.length(
            prompt.ids,
            conversation,
            options.tools,
            lambda opening: build(opening, [], None),
            options.thinking,
            numbered,
        )
    groups = [group for item in left for group in item.groups]
    n_left = sum(item.layout.frames for item in left)
    return Prepared(
        prompt,
        groups,
        [group_digest(group) for group in groups],
        [size for item in left for size in item.sizes],
        pictures[len(pictures) - n_left :],
        [clip.facts() for clip in dict.fromkeys(item.clip for item in left) if clip is not None],
        n_dropped,
        fitted,
        begun,
        None if n_dropped or options.raw else lambda more: build([*known, *more], placed, None),
        shared,
    )


def _prompt_of_ids(options: PromptOptions, tokenizer: Tokenizer) -> Prompt:
    """A prompt that was given in tokens."""
    ids, n = options.prompt_ids, len(tokenizer.tokens)
    if not options.raw:
        raise MessageError("prompt_ids was given without raw=True, but the chat template makes its own tokens.")
    if not isinstance(ids, list | tuple) or not ids:
        raise MessageError("The prompt's tokens are no list, or an empty one; expected token ids.")
    for number, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < n:
            raise MessageError(f"Token {number} of the prompt is {token_id!r}; expected a number from 0 to {n - 1}.")
    return Prompt(b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace"), [*ids], [])


def _place(
    parts: Sequence[ImagePart], ids: Sequence[int], index: int, options: PromptOptions, slicing: SlicingConfig
) -> tuple[Placed, list[list[int]]]:
    """What stands for one placeholder, and the sizes of its pictures; frames of videos are not decoded.

    Parameters
    ----------
    index : of the first picture in the conversation.
    """
    first = parts[0]
    if isinstance(first, FramePart):
        clip = first.clip
        layout = ImageLayout(index, clip.plan.grid, len(ids))
        slices = [[*size] for _ in ids for size in clip.plan.sizes]
        return Placed(layout, [*clip.group(first.number)], slices, clip), [[*clip.size] for _ in ids]
    frames = [_cut(part, options, slicing) for part in parts]
    layout = ImageLayout(index, frames[0][1].grid, len(ids))
    sizes = [[int(s.pixels.shape[1]), int(s.pixels.shape[0])] for _, _, slices in frames for s in slices]
    groups = pack_frames([slices for _, _, slices in frames], ids)
    return Placed(layout, [*groups], sizes), [[*size] for size, _, _ in frames]


def _cut(part: ImagePart, options: PromptOptions, slicing: SlicingConfig) -> tuple[Size, SlicePlan, list[Slice]]:
    limit = part.max_slices if part.max_slices is not None else options.max_slices
    size, slices = cut_source(part.source, options.pixel_limit, slicing, limit)
    return size, plan_slices(*size, slicing, limit), [Slice(pixels, slicing) for pixels in slices]


def group_digest(group: Group) -> bytes:
    """Fingerprint of all that decides a group's visual tokens: pixels or where they come from, arrangement, times."""
    if isinstance(group, LazyGroup):
        return group.digest
    digest = hashlib.blake2b(digest_size=16)
    for item, time in group:
        digest.update(repr((item.pixels.shape, time)).encode())
        digest.update(np.ascontiguousarray(item.pixels).data)
    return digest.digest()


def pack_frames(frames: Sequence[list[Slice]], ids: Sequence[int]) -> list[LoadedGroup]:
    """Groups of one set of frames: slice j of all frames together, slice after slice.

    Raises
    ------
    MessageError
        When the frames are cut differently, so that they cannot share placeholders.
    """
    counts = {len(slices) for slices in frames}
    if len(counts) != 1:
        raise MessageError(
            f"The frames of one group are cut into {sorted(counts)} slices, expected the same number for all; use "
            "frames of one size, or max_slices=1."
        )
    return [[(frame[j], time) for frame, time in zip(frames, ids, strict=True)] for j in range(counts.pop())]
