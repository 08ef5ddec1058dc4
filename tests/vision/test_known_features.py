"""Equal slices are encoded once, and it shows in nothing but the time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_runtime.inputs.slicing import Slice
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.vision.known_features import KnownFeatures, slice_digest
from edge_runtime.vision.tower import VisionTower


@pytest.fixture
def encoder(exact_folder: Any) -> ImageEncoder:
    (path,) = exact_folder.glob("mmproj*.gguf")
    return ImageEncoder(path, exact=False)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slices each run of the tower had."""
    runs: list[int] = []
    encode = VisionTower.encode

    def count(self: VisionTower, slices: Any, on_layer: Any) -> Any:
        runs.append(len(slices))
        return encode(self, slices, on_layer)

    monkeypatch.setattr(VisionTower, "encode", count)
    return runs


def slices_of(encoder: ImageEncoder, n: int, seed: int = 0) -> list[Slice]:
    side = 4 * encoder.slicing.patch_size
    pixels = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)
    return [Slice(p, encoder.slicing) for p in pixels]


def test_frames_that_repeat_are_encoded_once(encoder, encoded):
    a, b = slices_of(encoder, 2)
    copy = Slice(a.pixels.copy(), a.config)
    groups = [[(a, 0), (copy, 1), (a, 2)], [(a, 3), (b, 4)], [(b, 5)]]
    together = encoder.encode(groups)
    assert sum(encoded) == 2
    again = encoder.encode(groups[::-1])[::-1]
    assert sum(encoded) == 2
    fresh = [ImageEncoder(encoder.file.path, exact=False).encode([group])[0] for group in groups]
    for one, two, three in zip(together, again, fresh, strict=True):
        assert (one == two).all()
        assert (one == three).all()
    assert len({tokens.tobytes() for tokens in together}) == 3  # the times still count


def test_one_pixel_or_another_shape_is_another_slice(encoder):
    (a,) = slices_of(encoder, 1)
    changed = a.pixels.copy()
    changed[0, 0, 0] ^= 1
    flat = a.pixels.reshape(2 * a.pixels.shape[0], -1, 3)
    digests = {slice_digest(Slice(pixels, a.config)) for pixels in (a.pixels, changed, flat)}
    assert len(digests) == 3
    assert slice_digest(Slice(np.asfortranarray(a.pixels), a.config)) == slice_digest(a)


def test_what_is_kept_is_bounded(encoder, encoded):
    known = KnownFeatures(limit_bytes=100)
    whole = np.zeros((4, 10), np.float32)
    for i in range(4):
        known.put(bytes([i]), whole[i])
    assert [known.get(bytes([i])) is not None for i in range(4)] == [False, False, True, True]
    known.put(b"large", np.zeros(26, np.float32))
    assert known.get(b"large") is None
    known.get(b"\2")
    known.put(b"new", whole[0])
    assert known.get(b"\3") is None  # the least recently used
    (a,) = slices_of(encoder, 1)
    for release in (encoder.release_idle_memory, encoder.unload):
        before = sum(encoded)
        encoder.encode([[(a, -1)]])
        release()
        encoder.encode([[(a, -1)]])
        assert sum(encoded) >= before + 1
