"""The tower with one layer in memory at a time: the same bits, a layer packed once a call, and nothing lost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.decoder.sequence_chunk import Cancelled
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.slicing import Slice, plan_slices, slice_image
from edge_runtime.vision import encoder as encoders
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.vision.layer_by_layer import LayerByLayer
from edge_runtime.vision.tower import Layer


@pytest.fixture(scope="module", params=[False, True], ids=["int8", "exact"])
def pair(exact_folder: Path, request: pytest.FixtureRequest) -> tuple[ImageEncoder, ImageEncoder]:
    """The usual encoder, and one for low memory."""
    (path,) = exact_folder.glob("mmproj*")
    usual, low = (ImageEncoder(path, exact=request.param) for _ in range(2))
    low.low_memory = True
    return usual, low


@pytest.fixture
def low(pair: tuple[ImageEncoder, ImageEncoder]) -> Iterator[ImageEncoder]:
    yield pair[1]
    pair[1].unload()


@pytest.fixture
def packed(low: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the layers that the low one packs, in order; never are two of them alive."""
    found: list[int] = []
    alive: list[weakref.ref[Any]] = []
    make = low.tower.layer

    def watched(n: int) -> Layer:
        gc.collect()
        assert not any(layer() is not None for layer in alive), "the last layer is still in memory"
        layer = make(n)
        found.append(n)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(low.tower, "layer", watched)
    return found


@pytest.fixture
def slices(low: ImageEncoder, images: dict[str, Path]) -> list[Slice]:
    """Those of three pictures."""
    found = []
    for name in ("strip", "wide", "square"):
        picture = load_image(images[name])
        found += slice_image(picture, plan_slices(*picture.size, low.slicing), low.slicing)
    return found


def stills(slices: list[Slice]) -> list[list[tuple[Slice, int]]]:
    return [[(item, -1)] for item in slices]


@pytest.mark.parametrize("at_once", [1, 60, 10_000])
def test_tokens_are_the_same_bits(pair, slices, packed, monkeypatch, at_once):
    """However the slices are cut into runs; and each layer is packed once for all of them."""
    usual, low = pair
    monkeypatch.setattr(encoders, "BATCH_PATCHES", at_once)
    usual.forget_slices()
    expected = usual.encode(stills(slices))
    found = low.encode(stills(slices))
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    assert packed == [*range(low.tower.config.layers)]
    assert not low.tower.is_loaded
    assert low.known_bytes == 0


def test_groups_of_frames_too(pair, slices):
    usual, low = pair
    groups = [[(slices[0], 0), (slices[1], 7)], [(slices[1], 9), (slices[0], 12), (slices[2], 30)]]
    for one, other in zip(low.encode(groups), usual.encode(groups), strict=True):
        assert (one == other).all()


def test_calls_larger_than_memory_allows_are_cut(low, slices, packed, monkeypatch):
    """Then layers are packed again for each part."""
    half = sum(item.n_patches for item in slices) // 2 + 1
    expected = low.encode(stills(slices))
    packed.clear()
    monkeypatch.setattr(encoders, "LOW_MEMORY_PATCHES", half)
    assert low.batch_patches == half
    found = low.encode(stills(slices))
    assert len(packed) > low.tower.config.layers
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("stop_at", [0, 1, 4, 5, 7, 8])
def test_an_interrupted_call_goes_on_where_it_was(low, slices, packed, monkeypatch, stop_at):
    """At the start, in the middle of a layer, between layers; and what it reports goes on, too."""
    monkeypatch.setattr(encoders, "BATCH_PATCHES", 1)
    slices, layers = slices[:4], low.tower.config.layers
    expected = low.encode(stills(slices))
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done == stop_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        low.encode(stills(slices), stop)
    assert told == [(n, layers * len(slices)) for n in range(stop_at + 1)]
    assert low.known_bytes == sum(item.n_patches for item in slices) * low.tower.config.width * 4
    packed.clear()
    told.clear()
    found = low.encode(stills(slices), lambda done, total: told.append((done, total)))
    assert told[0][0] == stop_at
    assert told[-1][0] == told[-1][1]
    assert packed == [*range(stop_at // len(slices), layers)]
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    assert low.known_bytes == 0


def test_others_are_encoded_in_between(low, slices):
    """What was interrupted is kept beside them, and is not mixed up with other slices."""
    expected = low.encode(stills(slices))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        low.encode(stills(slices[:2]), stop)
    others, begun = low.encode(stills(slices[2:])), low.encode(stills(slices[:2]))
    assert all((one == other).all() for one, other in zip([*begun, *others], expected, strict=True))


def test_what_is_kept_of_interrupted_calls_is_bounded(low, slices):
    """The latest is kept; unloading forgets it."""
    small = LayerByLayer(low.tower, slices[0].n_patches)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise Cancelled

    for n in range(5):
        one = replace(slices[0], pixels=slices[0].pixels ^ np.uint8(n + 1))
        with pytest.raises(Cancelled):
            small.encode([[one]], [bytes([n])], stop)
        assert small.n_bytes == one.n_patches * low.tower.config.width * 4
    with pytest.raises(Cancelled):
        low.encode(stills(slices), stop)
    assert low.known_bytes > 0
    low.unload()
    assert low.known_bytes == 0
