"""Samples about shapes: colour and form, place, number, motion, which of two pictures.

Answers are right by construction: questions are made from the things that were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from demo.draw import COLORS, SHAPES, Thing, draw_things, place, shape_ground
from demo.sample import Mark, Sample, Size, pick

MAX_START, MAX_STEP = 1800, 20  # temporal ids, in units of 0.1 s

SHAPE_QUESTIONS = ("What shape is it?", "What shape is this?", "What shape do you see?")
COLOR_QUESTIONS = ("What color is it?", "What color is this?", "Which color is it?")
SCENE_QUESTIONS = ("What is in the image?", "What is in the picture?", "What do you see?", "Describe the image.")
ORDINALS = ("first", "second")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def article(words: str) -> str:
    """`words` with a or an."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def thing_facts(things: Sequence[Thing]) -> dict[str, list[int]]:
    """Numbers of all things, of each shape and of each colour."""
    return {
        "total": [len(things)],
        "shapes": [sum(thing.shape == shape for thing in things) for shape in SHAPES],
        "colors": [sum(thing.color == color for thing in things) for color in COLORS],
    }


def thing_marks(things: Sequence[Thing]) -> dict[str, list[Mark]]:
    """Centres of the things; the code stands for shape and colour together."""
    codes = [SHAPES.index(thing.shape) * len(COLORS) + list(COLORS).index(thing.color) for thing in things]
    return {"thing": [Mark(code, t.x, t.y, t.x, t.y) for code, t in zip(codes, things, strict=True)]}


def distinct_things(rng: np.random.Generator, size: Size, count: int) -> list[Thing] | None:
    """Things of different shapes and colours; None when they do not fit."""
    side = math.sqrt(size[0] * size[1])
    largest = min(0.3 * side, min(size) / 2 - 3)
    radii = rng.uniform(min(0.11 * side, largest), largest if count == 1 else min(largest, 0.19 * side), count)
    centres = place(rng, size, list(radii))
    if centres is None:
        return None
    shapes, colors = rng.permutation(SHAPES)[:count], rng.permutation(list(COLORS))[:count]
    return [
        Thing(str(shape), str(color), *centre, float(radius))
        for shape, color, centre, radius in zip(shapes, colors, centres, radii, strict=True)
    ]


def shape_sample(rng: np.random.Generator, size: Size, kind: str = "shape") -> Sample | None:
    """Colour and shape of one to three objects; other kinds than `shape`: relation, absent, followup."""
    count = int(rng.integers(2, 4)) if kind == "relation" else int(rng.integers(1, 4))
    things = distinct_things(rng, size, count)
    if things is None:
        return None
    thing, earlier = things[int(rng.integers(count))], None
    if kind == "relation":
        question_answer = _relation(rng, size, things)
        if question_answer is None:
            return None
        question, answer = question_answer
    elif kind == "absent":
        question, answer = _absent(rng, things)
    elif kind == "followup":
        earlier = (pick(rng, (f"What shape is {thing.color}?", f"Which shape is {thing.color}?")), thing.shape)
        if count == 1:
            earlier = (pick(rng, SHAPE_QUESTIONS), thing.shape)
        question, answer = pick(rng, COLOR_QUESTIONS), thing.color
    else:
        question, answer = _shape_question(rng, thing, count)
    picture, facts = draw_things(rng, size, things), thing_facts(things)
    return Sample(kind, [picture], question, answer, None, earlier, facts, thing_marks(things))


def _shape_question(rng: np.random.Generator, thing: Thing, count: int) -> tuple[str, str]:
    named = [
        (f"What color is the {thing.shape}?", thing.color),
        (f"Which color is the {thing.shape}?", thing.color),
        (f"What shape is {thing.color}?", thing.shape),
        (f"Which shape is {thing.color}?", thing.shape),
    ]
    if count > 1 or rng.random() < 0.4:
        return named[int(rng.integers(4))]
    return (
        (pick(rng, SHAPE_QUESTIONS), thing.shape),
        (pick(rng, COLOR_QUESTIONS), thing.color),
        (pick(rng, SCENE_QUESTIONS), article(f"{thing.color} {thing.shape}")),
    )[int(rng.integers(3))]


def _relation(rng: np.random.Generator, size: Size, things: Sequence[Thing]) -> tuple[str, str] | None:
    first, second = things[0], things[1]
    dx, dy = (first.x - second.x) * size[0], (first.y - second.y) * size[1]
    clear = 0.6 * (first.radius + second.radius)
    choices = []
    if abs(dx) > clear:
        choices.append((f"Is the {first.shape} left or right of the {second.shape}?", "left" if dx < 0 else "right"))
    if abs(dy) > clear:
        choices.append((f"Is the {first.shape} above or below the {second.shape}?", "above" if dy < 0 else "below"))
    return choices[int(rng.integers(len(choices)))] if choices else None


def _absent(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[str, str]:
    shown = [thing.shape for thing in things]
    missing = pick(rng, [shape for shape in SHAPES if shape not in shown])
    kind = rng.random()
    if kind < 0.5:
        return f"What color is the {missing}?", f"There is no {missing}."
    return (f"Is there a {missing}?", "no") if kind < 0.75 else (f"Is there a {pick(rng, shown)}?", "yes")


def count_sample(rng: np.random.Generator, size: Size, kind: str = "count") -> Sample | None:
    """Counting to six; `filter` asks for one kind among others."""
    if kind == "filter":
        asked = int(rng.integers(1, 6))
        total = asked + int(rng.integers(1, 7 - asked))
    else:
        asked = total = int(rng.integers(1, 7))
    side = math.sqrt(size[0] * size[1])
    largest = min(0.14 * side, min(size) / 2 - 3)
    radii = rng.uniform(min(0.075 * side, largest), largest, total)
    centres = place(rng, size, list(radii))
    if centres is None:
        return None
    by_color = bool(rng.random() < 0.5)
    shapes, colors = list(rng.permutation(SHAPES)), list(rng.permutation(list(COLORS)))
    if kind == "filter":
        others = int(rng.integers(1, 3))
        label = [0] * asked + [1 + int(rng.integers(others)) for _ in range(total - asked)]
        mixed = rng.random() < 0.5  # whether the other attribute varies, too
        free = [int(rng.integers(2)) if mixed else 0 for _ in range(total)]
        picks = [(f, n) if by_color else (n, f) for n, f in zip(label, free, strict=True)]
    elif rng.random() < 0.5:
        picks = [(0, 0)] * total
    else:
        picks = [(int(rng.integers(2)), int(rng.integers(2))) for _ in range(total)]
    things = [
        Thing(str(shapes[s]), str(colors[c]), *centre, float(radius))
        for (s, c), centre, radius in zip(picks, centres, radii, strict=True)
    ]
    if kind == "filter":
        noun = f"{colors[0]} shapes" if by_color else plural(str(shapes[0]))
    else:
        same = len({shape for shape, _ in picks}) == 1
        noun = plural(things[0].shape) if same and rng.random() < 0.5 else pick(rng, ("shapes", "objects"))
    questions = (f"How many {noun} are there?", f"How many {noun} do you see?", f"Count the {noun}.")
    question = questions[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
    picture, facts = draw_things(rng, size, things), thing_facts(things)
    return Sample(kind, [picture], question, str(asked), facts=facts, marks=thing_marks(things))


def video_sample(rng: np.random.Generator, size: Size, n_frames: int, *, start: int | None = None) -> Sample | None:
    """A shape that moves along one axis, in one packed group; its position is linear in time."""
    direction = pick(rng, list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    if start is None:
        start = 0 if rng.random() < 0.1 else int(rng.integers(MAX_START + 1))
    step = int(rng.integers(1, MAX_STEP + 1))
    jitter = rng.integers(-1, 2, n_frames) if step > 3 and rng.random() < 0.5 else np.zeros(n_frames, int)
    times = [max(0, int(start + step * i + j)) for i, j in enumerate(jitter)]
    color, shape = pick(rng, list(COLORS)), pick(rng, ("circle", "circle", *SHAPES))
    radius = float(rng.uniform(0.08, 0.15)) * min(size)
    low = np.array([(radius + 2) / size[0], (radius + 2) / size[1]])
    away = rng.uniform(low, 1 - low)
    axis = 0 if dx else 1
    travel = float(rng.uniform(0.35, 1)) * (1 - 2 * low[axis])
    begin = low[axis] + float(rng.uniform(0, 1 - 2 * low[axis] - travel))
    part = (np.array(times) - times[0]) / (times[-1] - times[0])
    track = begin + travel * (part if dx + dy > 0 else 1 - part)
    back = shape_ground(rng, [color])
    other = _bystander(rng, color) if rng.random() < 0.3 else []
    frames = []
    for value in track:
        x, y = (value, away[1]) if axis == 0 else (away[0], value)
        frames.append(draw_things(rng, size, [*other, Thing(shape, color, float(x), float(y), radius)], back))
    name = "ball" if shape == "circle" else shape
    questions = (
        f"Which way does the {name} move?",
        f"Where does the {name} go?",
        f"In which direction does the {name} move?",
        "In which direction is it moving?",
    )
    ends = [(v, away[1]) if axis == 0 else (away[0], v) for v in (track[0], track[-1])]
    facts = {"track": [min(9, int(10 * value)) for end in ends for value in end]}
    return Sample("video", frames, pick(rng, questions), direction, times, facts=facts)


def _bystander(rng: np.random.Generator, moving: str) -> list[Thing]:
    """A small square in a corner that does not move."""
    color = pick(rng, [name for name in COLORS if name != moving])
    return [Thing("square", color, pick_corner(rng), pick_corner(rng), 4.0)]


def pick_corner(rng: np.random.Generator) -> float:
    """Near one of the two ends, as a fraction."""
    return 0.06 if rng.random() < 0.5 else 0.94


def pictures_sample(rng: np.random.Generator, size: Size) -> Sample | None:
    """Two pictures, of which one shows the shape asked for."""
    shapes, colors = rng.permutation(SHAPES)[:2], rng.permutation(list(COLORS))[:2]
    pictures, asked = [], int(rng.integers(2))
    for shape, color in zip(shapes, colors, strict=True):
        radius = float(rng.uniform(0.15, 0.3)) * min(size)
        centres = place(rng, size, [radius])
        if centres is None:
            return None
        pictures.append(draw_things(rng, size, [Thing(str(shape), str(color), *centres[0], radius)]))
    noun = str(shapes[asked]) if rng.random() < 0.5 else f"{colors[asked]} shape"
    return Sample("pictures", pictures, f"Which picture shows the {noun}?", ORDINALS[asked])
