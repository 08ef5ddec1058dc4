"""Samples → arrays for training: one kind and one grid per batch, so that only the answers are padded.

Prompts are rendered and tokenised by `edge_runtime.prompt.build`, pictures cut by `edge_runtime.inputs.slicing`, so
that training sees exactly what inference will.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from demo.data import SLICING, chat_sample, large_size, patch_size, still_size, text_sample, video_size
from demo.dense import dense_sample
from demo.draw import COLORS, SHAPES
from demo.sample import CHARACTERS, Mark, Sample
from demo.things import count_sample, pictures_sample, shape_sample, video_sample
from edge_runtime.inputs.messages import ImagePart, Message
from edge_runtime.inputs.slicing import SlicePlan, plan_slices, slice_image
from edge_runtime.prompt.build import ImageLayout, Prompt, build_prompt
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.prompt.tokenizer import CONTROL, USER_DEFINED, Tokenizer

SKELETON = Path(__file__).resolve().parent / "skeleton"
"""Configuration and tokenizer of the demo model: a checkpoint without weights."""

N_QUERIES = 16
IGNORED = -100

# Auxiliary heads: what they read → (queries that must know it, number of classes). They are not part of the model.
HEADS: dict[str, tuple[tuple[int, ...], int]] = {
    "characters": (tuple(range(6)), 37),
    "track": ((8, 8, 9, 9), 10),
    "total": ((11,), 8),
    "shapes": ((10, 12, 13, 14, 15), 8),
    "colors": (tuple(range(8)), 8),
}

# Heads on patch features → number of classes; the background is one more class.
PATCH_HEADS = {"character": len(CHARACTERS), "thing": len(SHAPES) * len(COLORS)}

Maker = Callable[[np.random.Generator, tuple[int, int]], Sample | None]


class CheckpointTokenizer(Tokenizer):
    """The runtime's tokenizer, read from a checkpoint's tokenizer.json instead of a decoder file."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        model, added = content["model"], content["added_tokens"]
        by_id = {i: text for text, i in model["vocab"].items()} | {t["id"]: t["content"] for t in added}
        self.tokens = [by_id[i] for i in range(len(by_id))]
        special = {t["content"]: CONTROL if t["special"] else USER_DEFINED for t in added}
        self.types = [special.get(text, 1) for text in self.tokens]
        self._merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        self._normalizer = "nfc" if content["normalizer"] else "none"
        self._name = "tokenizer.json"
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        self.special_ids = {text: self.ids[text] for text in special}
        self.stop_ids = frozenset({self.ids["<|im_end|>"], self.ids["<|endoftext|>"]})


@dataclass
class Batch:
    """Arrays of one batch."""

    kind: str
    parts: list[tuple[npt.NDArray[np.uint8], tuple[int, int]]]
    """Per grid of patches: ndarray [shape=(B, n, P, 588), uint8] and (rows, columns)."""
    ids: npt.NDArray[np.int64]
    """ndarray [shape=(B, T)], padded at the end"""
    labels: npt.NDArray[np.int64]
    """ndarray [shape=(B, T)]: the next token where it belongs to the answer, else `IGNORED`"""
    holes: npt.NDArray[np.int64]
    """Positions of the visual tokens, the same in every row."""
    times: npt.NDArray[np.int64] | None = None
    """ndarray [shape=(B, frames)]: ids of the frames of one group"""
    facts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    named: dict[str, tuple[int, npt.NDArray[np.int64]]] = field(default_factory=dict)
    """Patch head → part, and ndarray [shape=(B, n, P)]: what each patch of that part shows"""


class BatchMaker:
    """Packs samples.

    Parameters
    ----------
    seed : of the whole run; batch `step` depends only on `(seed, step)` and the shares of the kinds.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tokenizer = CheckpointTokenizer(SKELETON)
        self._prompt = lru_cache(maxsize=4096)(self._build)

    def _build(
        self, question: str, earlier: tuple[str, str] | None, grids: tuple[tuple[int, int], ...], frames: int
    ) -> Prompt:
        first = (*[ImagePart(b"")] * (len(grids) * frames), earlier[0] if earlier else question)
        messages = [Message("user", first)]
        if earlier:
            messages += [Message("assistant", (earlier[1],)), Message("user", (question,))]
        return build_prompt(
            messages,
            [ImageLayout(i, grid, frames) for i, grid in enumerate(grids)],
            self._tokenizer,
            n_queries=N_QUERIES,
            template=OFFICIAL_CHAT_TEMPLATE,
            thinking=False,
            use_image_id=frames == 1,
        )

    def make(self, step: int, mixture: dict[str, float], ease: float = 0.0) -> Batch:
        """Make the batch of one step.

        Parameters
        ----------
        mixture : kind → weight; kinds as in `RECIPES`.
        ease : share of easy text pictures, 0..1.
        """
        rng = np.random.default_rng([self._seed, step])
        kinds, weights = list(mixture), np.array(list(mixture.values()))
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        sizes, make, per_batch, cells = RECIPES[kind]
        frames = int(rng.choice([2, 3, 4], p=[0.35, 0.35, 0.3])) if kind == "video" else 1
        size = sizes(rng)
        count = per_batch // (plan_slices(*size, SLICING).n_slices if cells else frames)
        samples: list[Sample] = []
        misses = 0
        while len(samples) < max(4, count):
            if kind == "video":
                sample = video_sample(rng, size, frames)
            elif make in (text_sample, dense_sample):
                sample = make(rng, size, ease=ease)
            else:
                sample = make(rng, size)
            if sample is not None:
                samples.append(sample)
                continue
            misses += 1
            if misses > 200 and not samples:  # nothing fits this size
                size, misses = sizes(rng), 0
                count = per_batch // (plan_slices(*size, SLICING).n_slices if cells else frames)
        return self.pack(kind, samples)

    def pack(self, kind: str, samples: list[Sample]) -> Batch:
        """Pack samples that share kind and size."""
        video = samples[0].temporal_ids is not None
        n_pictures = len(samples[0].pictures)
        plans = [plan_slices(*picture.size, SLICING, 1 if video else None) for picture in samples[0].pictures]
        grids = tuple(plan.grid for plan in (plans[:1] if video else plans))
        prompts = [self._prompt(s.question, s.earlier, grids, n_pictures if video else 1) for s in samples]
        if samples[0].kind == "dense":
            none = np.zeros((len(samples), 0), np.int64)
            return Batch(kind, _cut(samples), none, none, none[0], named=_name(samples, plans[0]))
        answers = [[*self._tokenizer.encode(s.answer), self._tokenizer.ids["<|im_end|>"]] for s in samples]
        width = max(len(p.ids) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
        ids = np.full((len(samples), width), self._tokenizer.ids["<|endoftext|>"], np.int64)
        labels = np.full((len(samples), width), IGNORED, np.int64)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            whole = prompt.ids + answer
            ids[row, : len(whole) - 1] = whole[:-1]
            labels[row, len(prompt.ids) - 1 : len(whole) - 1] = answer
        bounds = prompts[0].bounds
        holes = np.concatenate([np.arange(*bound) for bound in bounds]) if bounds else np.zeros(0, np.int64)
        times = np.array([s.temporal_ids for s in samples]) if video else None
        parts = _cut(samples) if n_pictures else []
        named = _name(samples, plans[0]) if n_pictures == 1 else {}
        return Batch(kind, parts, ids, labels, holes, times, _facts(samples), named)


def _facts(samples: list[Sample]) -> dict[str, npt.NDArray[np.int64]]:
    return {name: np.array([sample.facts[name] for sample in samples]) for name in samples[0].facts}


def _cut(samples: list[Sample]) -> list[tuple[npt.NDArray[np.uint8], tuple[int, int]]]:
    """Patches of all pictures: overviews (or frames, or several pictures) are one part, cells another."""
    video = samples[0].temporal_ids is not None
    overviews, cells, grids = [], [], {}
    for sample in samples:
        slices = [
            slice_image(picture, plan_slices(*picture.size, SLICING, 1 if video else None), SLICING)
            for picture in sample.pictures
        ]
        overviews.append([_patches(s[0].pixels) for s in slices])
        cells.append([_patches(cell.pixels) for s in slices for cell in s[1:]])
        grids = {0: slices[0][0].tgt_size, 1: slices[0][-1].tgt_size}
    parts = [(np.array(overviews), grids[0])]
    return [*parts, (np.array(cells), grids[1])] if cells[0] else parts


def name_patches(marks: Sequence[Mark], head: str, rows: int, cols: int) -> npt.NDArray[np.int64]:
    """What each patch shows: ndarray [shape=(rows, cols)].

    A mark labels the patch at its centre; a large one also labels all patches whose centre it covers.
    """
    named = np.full((rows, cols), PATCH_HEADS[head])
    middles_x, middles_y = (np.arange(cols) + 0.5) / cols, (np.arange(rows) + 0.5) / rows
    for mark in marks:
        x, y = (mark.left + mark.right) / 2, (mark.top + mark.bottom) / 2
        if not (0 <= x < 1 and 0 <= y < 1):
            continue
        covered = np.ix_(
            (middles_y >= mark.top) & (middles_y <= mark.bottom), (middles_x >= mark.left) & (middles_x <= mark.right)
        )
        named[covered] = mark.code
        named[int(y * rows), int(x * cols)] = mark.code
    return named


def _name(samples: list[Sample], plan: SlicePlan) -> dict[str, tuple[int, npt.NDArray[np.int64]]]:
    """Label characters where they are legible (in the cells, if there are any) and things in the overview."""
    result = {}
    for head in samples[0].marks:
        cut = head == "character" and plan.n_slices > 1
        (w, h), (cols, rows) = (plan.cell, plan.grid) if cut else (plan.source, (1, 1))
        w, h = w // 14, h // 14
        grids = np.array([name_patches(sample.marks[head], head, rows * h, cols * w) for sample in samples])
        grids = grids.reshape(-1, rows, h, cols, w).transpose(0, 1, 3, 2, 4)
        result[head] = (int(cut), grids.reshape(len(samples), rows * cols, h * w))
    return result


def _patches(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Flattened patches in the order of the patch kernel: ndarray [shape=(P, 588), uint8]."""
    rows, cols = pixels.shape[0] // 14, pixels.shape[1] // 14
    return pixels.reshape(rows, 14, cols, 14, 3).transpose(0, 2, 4, 1, 3).reshape(rows * cols, 588)


def _shape(kind: str) -> Maker:
    return lambda rng, size: shape_sample(rng, size, kind)


def _count(kind: str) -> Maker:
    return lambda rng, size: count_sample(rng, size, kind)


# kind → picture sizes, sample, slices per batch, whether pictures are cut
RECIPES: dict[str, tuple[Callable[[np.random.Generator], tuple[int, int]], Maker, int, bool]] = {
    "dense": (patch_size, dense_sample, 48, False),
    "text": (still_size, text_sample, 48, False),
    "text vision": (still_size, text_sample, 48, False),  # loss of the auxiliary heads only: half the cost
    "slices": (large_size, text_sample, 64, True),
    "shape": (still_size, _shape("shape"), 48, False),
    "relation": (still_size, _shape("relation"), 48, False),
    "absent": (still_size, _shape("absent"), 48, False),
    "followup": (still_size, _shape("followup"), 48, False),
    "count": (still_size, _count("count"), 48, False),
    "filter vision": (still_size, _count("filter"), 48, False),
    "filter": (still_size, _count("filter"), 48, False),
    "shape slices": (large_size, _shape("shape"), 64, True),
    "count slices": (large_size, _count("count"), 64, True),
    "video": (video_size, text_sample, 72, False),
    "pictures": (video_size, pictures_sample, 32, False),
    "chat": (still_size, chat_sample, 16, False),
}
