"""The whole data flow as one readable function. Start here.

    messages ─ parse_messages ─┬─ documents ─ with_pages ─┐
                               ├─ pictures ───────────────┴─ load_image ─ slice_image ─ groups ──────────┐
                               ├─ videos ─ choose ─ parts for frames, groups that decode themselves ─────┤
                               └─ text + layouts ─ build_prompt ─ ids + bounds ──────────────────────────┴─ Request

The rest happens on the engine's thread (`engine`): groups ─ vision ─ resampler ─ visual tokens; ids ─ embedding
rows; both become one stream of embeddings ─ decoder ─ sampler ─ pieces of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edge_runtime.cache.shared_prefixes import Beginnings
from edge_runtime.errors import MessageError
from edge_runtime.inputs.clips import FramePart, expand_videos, group_ids
from edge_runtime.inputs.documents import with_pages
from edge_runtime.inputs.messages import ImagePart, Message, parse_messages
from edge_runtime.inputs.opener import InThisProcess, Opener, cut_source
from edge_runtime.inputs.pages import MAX_TEXT, Page
from edge_runtime.inputs.presets import preset_named, with_preset
from edge_runtime.inputs.slice_groups import Group, LazyGroup, LoadedGroup
from edge_runtime.inputs.slicing import Size, Slice, SlicePlan, plan_slices
from edge_runtime.inputs.video.frame_choice import check_groups
from edge_runtime.options import NO_HOOKS, PreparationHooks, PromptOptions
from edge_runtime.prompt.build import ImageLayout, Prompt, PromptLimit, build_prompt, iter_images
from edge_runtime.prompt.context_budget import Budget, check_tools_fit, share_of_tools
from edge_runtime.prompt.context_shift import Placed, fit
from edge_runtime.prompt.continuation import BegunTurn, find_begun_turn
from edge_runtime.prompt.long_text import nothing
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.weights.config import SlicingConfig

MAX_COUNTED = 16
"""Contexts that a prompt may fill for its tokens to be counted, for the error or for the turns to be dropped."""
MAX_SHIFTED = 2
"""Contexts that a conversation must fill for certain for its oldest turns to be dropped uncounted."""


@dataclass(frozen=True)
class InputFormat:
    """What a model's prompts look like."""

    slicing: SlicingConfig
    tokenizer: Tokenizer
    n_queries: int
    """Visual tokens per slice."""
    template: str
    """The chat template (Jinja)."""
    n_ctx: int = 0
    """Positions in the context."""


@dataclass(frozen=True)
class Prepared:
    """A conversation ready for the engine."""

    prompt: Prompt
    groups: list[Group]
    """Slices for each run of visual tokens."""
    digests: list[bytes] = field(default_factory=list)
    """One for each group; groups with equal digests have equal visual tokens."""
    slices: list[list[int]] = field(default_factory=list)
    """[width, height] of every slice, in order."""
    pictures: list[list[int]] = field(default_factory=list)
    """[width, height] of every picture and video frame, upright, in order."""
    videos: list[dict[str, Any]] = field(default_factory=list)
    """Facts about each video; see `Answer.videos`."""
    dropped_turns: int = 0
    """Oldest turns that were left out."""
    fitted_slices: int | None = None
    """Maximum cells per picture after `fit` has lowered it; None if it was not lowered."""
    begun: BegunTurn | None = None
    """The turn that the answer continues."""
    with_more: Callable[[Sequence[Message]], Prompt] | None = None
    """Builds the prompt of this conversation followed by further messages, without pictures; a whole turn replaces
    one that was begun."""
    shared: int = 0
    """Leading positions of the prompt that other chats have, too; see `shared_prefixes`."""
    page_text: str = ""
    """What the pages say of their own text, where it is to be transcribed: the answer probably is much like it."""


@dataclass(frozen=True)
class _PromptWriter:
    """Builds the prompts of a conversation, whole, in part, or with more messages, all in the same way."""

    options: PromptOptions
    model: InputFormat
    begun: BegunTurn | None
    numbered: bool
    """Whether pictures are numbered."""
    limit: PromptLimit | None
    """Of the length of a prompt; None if the engine is not to compute it."""
    check: Callable[[], None]
    """Called often while a long text is read; what it raises ends the work."""

    def prompt(self, messages: Sequence[Message], pictures: Sequence[Placed]) -> Prompt:
        """The prompt that an answer continues, including a turn that was begun."""
        return self._build(messages, pictures, self.begun, self.options.tools)

    def new_turn(self, messages: Sequence[Message], pictures: Sequence[Placed] = ()) -> Prompt:
        """The prompt of a new turn."""
        return self._build(messages, pictures, None, self.options.tools)

    def share_of_tools(self, conversation: Sequence[Message]) -> str:
        """Text for an error: how much of a too long prompt the tools take."""
        few = [*(message for message in conversation if message.role == "system"), Message("user", ("?",))]
        return share_of_tools(lambda tools: self._build(few, [], None, tools), self.options.tools)

    def _build(
        self,
        messages: Sequence[Message],
        pictures: Sequence[Placed],
        begun: BegunTurn | None,
        tools: Sequence[dict[str, Any]],
    ) -> Prompt:
        return build_prompt(
            messages,
            [item.layout for item in pictures],
            self.model.tokenizer,
            n_queries=self.model.n_queries,
            template=self.model.template,
            thinking=self.options.thinking,
            use_image_id=self.numbered,
            tools=tools,
            raw=self.options.raw,
            begun=begun,
            limit=self.limit,
            check=self.check,
        )


def prepare(
    messages: str | Sequence[Any],
    options: PromptOptions,
    model: InputFormat,
    *,
    reserve_tokens: int = 0,
    refuse: bool = False,
    beginnings: Beginnings | None = None,
    hooks: PreparationHooks = NO_HOOKS,
    opener: Opener | None = None,
) -> Prepared:
    """Turn a conversation into a prompt and its slices.

    Parameters
    ----------
    options : checked ones (`option_checks`).
    reserve_tokens : positions of the context to keep free for the answer; for `context_shift` and `fit`.
    refuse : reject what does not fit before pictures are decoded.
    beginnings : finds the prefix that other chats have, too; None: not looked for.
    hooks : progress callbacks; an exception from one ends the work.
    opener : opens documents, pictures and videos; None: this process does.

    Raises
    ------
    MessageError, ImageError
        When the conversation, a document, a picture or a video cannot be used; nothing has been computed.
    PromptTooLongError
        When it does not fit, with `refuse` or `fit`.
    """
    if options.prompt_ids is not None:
        return Prepared(_prompt_of_ids(options.prompt_ids, model.tokenizer), [])
    opener = opener or InThisProcess()
    conversation: Sequence[Message] = parse_messages(messages)
    conversation, begun = find_begun_turn(
        conversation, options.continue_final_message, thinking=options.thinking, raw=options.raw
    )
    conversation = conversation if options.preset is None else with_preset(conversation, options.preset)
    conversation = with_pages(conversation, options, model.slicing, options.max_slices, opener.part)
    page_text = _page_text(conversation, options)
    conversation = expand_videos(conversation, model.slicing, options.video_limits, hooks.on_look, opener.video)
    times, numbered = _picture_groups(conversation, options), _numbers_pictures(conversation, options, model.slicing)
    limit = _limit(options, model.n_ctx) if refuse else None
    writer = _PromptWriter(options, model, begun, numbered, limit, hooks.on_check)
    fitted_slices: int | None = None
    if refuse or options.fit:
        conversation, fitted_slices = _fit_cells(conversation, times, writer, reserve_tokens)
    placed, pictures = _place_pictures(conversation, times, options, model.slicing, hooks.on_image)
    prompt, left, n_dropped = _write_prompt(conversation, placed, writer, reserve_tokens)
    if refuse and options.tools:
        check_tools_fit(prompt, model.n_ctx, lambda: writer.share_of_tools(conversation))
    return replace(
        _prepared(prompt, left, pictures),
        dropped_turns=n_dropped,
        fitted_slices=fitted_slices,
        begun=begun,
        with_more=None if n_dropped or options.raw else _with_more(conversation, placed, writer),
        shared=_shared_positions(prompt, conversation, writer, beginnings),
        page_text=page_text,
    )


def _page_text(conversation: Sequence[Message], options: PromptOptions) -> str:
    """Text layers of the pages of the last message, if they are to be transcribed."""
    if options.preset is None or not preset_named(options.preset).transcribes:
        return ""
    found = ""
    for part in iter_images(conversation[-1:]):
        if isinstance(part.source, Page) and len(found) < MAX_TEXT:
            found += f"\n\n{part.source.text().strip()}"
    return found.strip()


def _prompt_of_ids(ids: Sequence[int], tokenizer: Tokenizer) -> Prompt:
    """A prompt given as tokens."""
    return Prompt(b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace"), [*ids], [])


def _picture_groups(conversation: Sequence[Message], options: PromptOptions) -> Sequence[Sequence[int]]:
    """Temporal ids of all pictures in order, grouped by placeholder."""
    parts = list(iter_images(conversation))
    times = group_ids(parts, options.temporal_ids)
    check_groups(times, len(parts))
    return times


def _numbers_pictures(conversation: Sequence[Message], options: PromptOptions, slicing: SlicingConfig) -> bool:
    if options.use_image_id is not None:
        return options.use_image_id
    has_video = any(isinstance(part, FramePart) for part in iter_images(conversation))
    return slicing.use_image_id and not has_video


def _limit(options: PromptOptions, n_ctx: int) -> PromptLimit | None:
    """How long a prompt is worth tokenising."""
    if not n_ctx:
        return None
    return PromptLimit(n_ctx, MAX_SHIFTED * n_ctx if options.context_shift else n_ctx - 1, MAX_COUNTED * n_ctx)


def _fit_cells(
    conversation: Sequence[Message], times: Sequence[Sequence[int]], writer: _PromptWriter, reserve_tokens: int
) -> tuple[Sequence[Message], int | None]:
    """Check the conversation against the context; with `fit`, cut its pictures into fewer cells until it fits."""
    options, model = writer.options, writer.model
    budget = Budget(
        model.slicing, model.n_queries, options.max_slices, options.pixel_limit, options.fit, options.context_shift
    )
    return budget.fit_slices(
        conversation, times, writer.prompt, model.n_ctx, reserve_tokens, lambda: writer.share_of_tools(conversation)
    )


def _place_pictures(
    conversation: Sequence[Message],
    times: Sequence[Sequence[int]],
    options: PromptOptions,
    slicing: SlicingConfig,
    on_image: Callable[[int, int], None],
) -> tuple[list[Placed], list[list[int]]]:
    """Decode and cut all pictures; returns what goes into each placeholder, and the sizes of all pictures."""
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
    return placed, pictures


def _write_prompt(
    conversation: Sequence[Message], placed: Sequence[Placed], writer: _PromptWriter, reserve_tokens: int
) -> tuple[Prompt, Sequence[Placed], int]:
    """The prompt, the remaining placeholders, and how many turns were left out."""
    left, n_dropped = placed, 0
    if writer.options.context_shift:
        prompt, left, n_dropped = fit(writer.prompt, conversation, placed, writer.model.n_ctx, reserve_tokens)
    else:
        prompt = writer.prompt(conversation, placed)
    if not prompt.ids:
        raise MessageError(
            "The prompt is empty: the model's chat template makes nothing of these messages; expected text for the "
            "model to go on with. Use a file with the official template, or send a raw prompt."
        )
    return prompt, left, n_dropped


def _prepared(prompt: Prompt, placed: Sequence[Placed], pictures: Sequence[list[int]]) -> Prepared:
    """A prompt with everything for its placeholders.

    Parameters
    ----------
    pictures : sizes of all pictures; those of dropped turns come first.
    """
    groups = [group for item in placed for group in item.groups]
    n_left = sum(item.layout.frames for item in placed)
    return Prepared(
        prompt,
        groups,
        digests=[group_digest(group) for group in groups],
        slices=[size for item in placed for size in item.sizes],
        pictures=[*pictures[len(pictures) - n_left :]],
        videos=[clip.facts() for clip in dict.fromkeys(item.clip for item in placed) if clip is not None],
    )


def _with_more(
    conversation: Sequence[Message], placed: Sequence[Placed], writer: _PromptWriter
) -> Callable[[Sequence[Message]], Prompt]:
    known = conversation if writer.begun is None else conversation[:-1]
    later = replace(writer, check=nothing)  # the callback belongs to the request, which may have ended
    return lambda more: later.new_turn([*known, *more], placed)


def _shared_positions(
    prompt: Prompt, conversation: Sequence[Message], writer: _PromptWriter, beginnings: Beginnings | None
) -> int:
    """Leading positions of the prompt that other chats have, too."""
    options = writer.options
    if beginnings is None or options.raw:
        return 0
    return beginnings.length(
        prompt.ids, conversation, options.tools, writer.new_turn, options.thinking, writer.numbered
    )


def _place(
    parts: Sequence[ImagePart], ids: Sequence[int], index: int, options: PromptOptions, slicing: SlicingConfig
) -> tuple[Placed, list[list[int]]]:
    """What goes into one placeholder, and the sizes of its pictures; frames of videos are not decoded.

    Parameters
    ----------
    index : index of the first picture in the conversation.
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
    """Fingerprint of everything that affects a group's visual tokens: pixels or their source, arrangement, times."""
    if isinstance(group, LazyGroup):
        return group.digest
    digest = hashlib.blake2b(digest_size=16)
    for item, time in group:
        digest.update(repr((item.pixels.shape, time)).encode())
        digest.update(np.ascontiguousarray(item.pixels).data)
    return digest.digest()


def pack_frames(frames: Sequence[list[Slice]], ids: Sequence[int]) -> list[LoadedGroup]:
    """Groups for one set of frames: slice j of all frames together, slice after slice.

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
