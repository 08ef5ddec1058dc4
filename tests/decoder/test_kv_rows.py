"""Rows of the KV cache out of llama.cpp and in again: the same bytes, the same logits, no trust in foreign bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kv_rows import KVRows, UnknownState, build, parse
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.errors import CacheFull


@pytest.fixture(params=[True, False], ids=["exact", "default"])
def decoder(request, exact_folder: Path):
    (path,) = (p for p in exact_folder.glob("*.gguf") if "mmproj" not in p.name)
    opened = Decoder(path, DecoderOptions(n_ctx=256, exact=request.param))
    yield opened
    opened.close()


def fill(decoder: Decoder, sequence: int, ids: list[int]) -> np.ndarray:
    rows = decoder.step([SequenceChunk(sequence, ids)])
    return decoder.logits(rows[0])


def test_rows_put_back_give_the_same_logits(decoder):
    # In other cells, so sums are taken in another order: the last bits may differ.
    ids = list(range(100, 140))
    fill(decoder, 0, ids)
    expected = fill(decoder, 0, [7])
    rows = decoder.read_rows(0, 0, len(ids))
    assert len(rows) == 40
    decoder.append_rows(1, ids, rows)
    assert decoder.held(1) == 40
    np.testing.assert_allclose(fill(decoder, 1, [7]), expected, atol=2e-5)
    # Behind positions that are there already, and among the cells of others.
    decoder.share(0, 2, 16)
    decoder.rewind(0)
    decoder.append_rows(2, ids[16:], rows[16:])
    np.testing.assert_allclose(fill(decoder, 2, [7]), expected, atol=2e-5)


def test_reading_and_building_agree(decoder):
    fill(decoder, 3, [5, 6, 7, 8, 9])
    rows = decoder.read_rows(3, 1, 4)
    again = parse(build(rows, 1))
    assert again.form == rows.form
    assert again.to_bytes() == rows.to_bytes()
    raw = np.frombuffer(rows.to_bytes(), np.uint8)
    assert len(raw) == 3 * rows.form.position_bytes
    assert KVRows.from_bytes(rows.form, raw).to_bytes() == rows.to_bytes()
    assert KVRows.join([rows[:1], rows[1:]]).to_bytes() == rows.to_bytes()


def test_cells_in_another_order_are_sorted(decoder):
    fill(decoder, 0, [1, 2, 3, 4])
    rows = decoder.read_rows(0, 0, 4)
    state = build(rows, 0)
    head = 16
    cells = state[head : head + 4 * 12].view(np.dtype([("position", "<i4"), ("n", "<u4"), ("seq", "<i4")]))
    cells["position"] = [3, 1, 2, 0]
    again = parse(state)
    assert np.array_equal(again.keys[0], rows.keys[0][[3, 1, 2, 0]])
    assert np.array_equal(again.values[-1], rows.values[-1][[3, 1, 2, 0]])


def test_a_full_cache_and_another_kind_are_told_and_change_nothing(decoder):
    fill(decoder, 0, list(range(200)))
    rows = decoder.read_rows(0, 0, 200)
    with pytest.raises(CacheFull):
        decoder.append_rows(1, list(range(200)), rows)
    assert (decoder.held(0), decoder.held(1)) == (200, 0)
    half = [part[:, ::2] for part in rows.keys]
    narrow = KVRows(type(rows.form)(**{**rows.form.facts(), "key_bytes": half[0].shape[1]}), half, rows.values)
    with pytest.raises(CacheFull):
        decoder.append_rows(1, list(range(10)), narrow[:10])
    fill(decoder, 1, list(range(50)))  # all cells but those of the first sequence are free


@pytest.mark.parametrize("cut", [0, 15, 40, -1])
def test_a_state_that_ends_early_is_refused(decoder, cut):
    fill(decoder, 0, [1, 2, 3, 4])
    state = build(decoder.read_rows(0, 0, 4), 0)
    with pytest.raises(UnknownState):
        parse(state[:cut])
    state[0] ^= 1
    with pytest.raises(UnknownState):
        parse(state)
