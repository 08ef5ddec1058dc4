"""Prompts computed by our AMX kernels: as near to float64 as llama.cpp, and of no consequence for anything else.

What the decoder and the engine do with such prompts is tested with a plain prefill in NumPy too, which runs anywhere.
"""

from __future__ import annotations

import mmap
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_runtime.decoder.decoder as decoding
from edge_kernels.linear.gguf_blocks import IS_POSSIBLE
from edge_runtime import Model
from edge_runtime.decoder import prefill_routing as routing
from edge_runtime.decoder.amx_prefill import PrefillChunk, supports_amx_prefill
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.decoder.prefill_routing import MIN_ROWS, PastSpace
from edge_runtime.decoder.sequence_chunk import Cancelled, SequenceChunk
from edge_runtime.errors import CacheFull
from edge_runtime.loading.memory_needs import estimate_memory
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.gguf_file import GGUFFile
from edge_runtime.weights.memory_map import Region, foreign_regions, map_file, region_bytes, release_region, watched
from plain_decoder import PlainDecoder

DEMO = Path(__file__).parents[2] / "edge_runtime" / "demo" / "ggml-model-Q4_K_M.gguf"
SIGN = Path(__file__).parents[2] / "examples" / "sign.png"

needs_amx = pytest.mark.skipif(
    not IS_POSSIBLE, reason="this machine has no AMX, or EDGE_RUNTIME_ISA names another set"
)
KINDS = [pytest.param("plain"), pytest.param("kernels", marks=needs_amx)]


@pytest.fixture(params=KINDS)
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prompts of the demo model are computed here, although it is small."""
    monkeypatch.setattr(routing, "MIN_FILE_BYTES", 0)
    if request.param == "plain":
        monkeypatch.setattr(decoding, "AmxPrefill", PlainDecoder)
        monkeypatch.setattr(routing, "supports_amx_prefill", lambda file: True)
    return request.param


def open_decoder(*, amx_prefill: bool | None = None, **options: Any) -> Decoder:
    return Decoder(DEMO, DecoderOptions(n_ctx=512, amx_prefill=amx_prefill, **options))


@pytest.fixture
def decoder(amx: str) -> Iterator[Decoder]:
    found = open_decoder()
    assert found.uses_amx_prefill
    yield found
    found.close()


@pytest.fixture(scope="module")
def theirs() -> Iterator[Decoder]:
    found = open_decoder(amx_prefill=False)
    assert not found.uses_amx_prefill
    yield found
    found.close()


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 500, n)]


def error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- what is read back -----------------------------------------------------------------------------------------


def test_memory_for_the_past_is_kept_but_not_given_twice():
    space = PastSpace(1 << 16)
    first, second = space.take(1000), space.take(70)
    first[:], second[:] = 1, 2
    assert (first.sum(), second.sum()) == (1000, 140)
    large = space.take(1 << 16)  # more than is left: its own
    assert not any(np.shares_memory(large, part) for part in (first, second))
    space.begin()
    assert np.shares_memory(space.take(500), first)
    assert len(space.take(1 << 17)) == 1 << 17


def test_sequences_that_go_on_together_do_not_share_what_is_read_back(decoder):
    """Both pasts are read before anything is computed."""
    ids = [tokens(30, seed) for seed in (1, 2)]
    alone = []
    for i in ids:
        decoder.step([SequenceChunk(0, i[:20], wants_logits=False)])
        (row,) = decoder.step([SequenceChunk(0, i[20:], wants_logits=True)])
        alone.append(decoder.logits(row).copy())
        decoder.rewind(0)
    decoder.step([SequenceChunk(n, i[:20], wants_logits=False) for n, i in enumerate(ids)])
    rows = decoder.step([SequenceChunk(n, i[20:], wants_logits=True) for n, i in enumerate(ids)])
    for row, expected in zip(rows, alone, strict=True):
        assert error(decoder.logits(row), expected) < 1e-3


# --- what is computed ------------------------------------------------------------------------------------------


@needs_amx
@pytest.mark.parametrize("n", [8, 33, 200, 470])
def test_logits_are_as_near_to_float64_as_those_of_llama_cpp(theirs: Decoder, n: int) -> None:
    mine, ids = open_decoder(amx_prefill=True), tokens(n)
    try:
        expected = PlainDecoder(mine.file).compute_one(PrefillChunk(mine.embed(np.array(ids))), rounded=False).logits
        errors = []
        for one in (mine, theirs):
            one.rewind(0)
            (row,) = one.step([SequenceChunk(0, ids)])
            assert one.is_local(row) == (one is mine)
            errors.append(error(one.logits(row), expected))
    finally:
        mine.close()
    assert errors[0] <= 1.25 * errors[1]
    assert errors[0] < 0.01


@needs_amx
def test_rows_in_the_cache_against_float64() -> None:
    mine, ids = open_decoder(amx_prefill=True), tokens(100)
    try:
        mine.step([SequenceChunk(0, ids[:60])])
        mine.step([SequenceChunk(0, ids[60:])])  # behind what is in the cache
        expected, rows = (
            PlainDecoder(mine.file).compute_one(PrefillChunk(mine.embed(np.array(ids)))).rows,
            mine.read_rows(0, 0, 100),
        )
    finally:
        mine.close()
    for side in ("keys", "values"):
        for found, wanted in zip(getattr(rows, side), getattr(expected, side), strict=True):
            found, wanted = found.view(np.float16).astype(np.float64), wanted.view(np.float16).astype(np.float64)
            assert error(found, wanted) < 0.01


def test_llama_cpp_goes_on_with_what_was_computed_here(decoder: Decoder, theirs: Decoder) -> None:
    ids = tokens(90)
    for one in (decoder, theirs):
        one.rewind(0)
        one.step([SequenceChunk(0, ids[:80])])
    for token in ids[80:]:
        found, expected = (one.logits(one.step([SequenceChunk(0, [token])])[0]) for one in (decoder, theirs))
        assert error(found, expected) < 0.03


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_weights_are_read_where_llama_cpp_has_them(tmp_path: Path) -> None:
    """Each of two decoders of one file finds its own; what we have mapped ourselves is never taken."""
    path = tmp_path / "model.gguf"
    shutil.copy(DEMO, path)
    file = GGUFFile(path)
    alone, first = file.tensor_bytes(None)
    one, other = (Decoder(path, DecoderOptions(n_ctx=64, amx_prefill=False)) for _ in range(2))
    another = GGUFFile(path)
    try:
        assert len(foreign_regions(path)) == 2
        assert one._region != other._region
        for decoder in (one, other):
            found, begin = file.tensor_bytes(decoder._region)
            assert begin == first
            assert not found.flags.writeable
            assert found.ctypes.data != alone.ctypes.data
            np.testing.assert_array_equal(found, alone)
        one.close()
        assert foreign_regions(path) == {other._region}
    finally:
        one.close()
        other.close()
    assert not foreign_regions(path)
    assert another.tensor_bytes(None)[0][0] == alone[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_mapping_that_might_be_somebody_else_s_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    before = np.memmap(path, np.uint8, "r")
    with watched(path) as none:
        pass
    assert none == []
    with path.open("rb") as opened:
        with watched(path) as one:
            first = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with watched(path) as two:
            rest = [mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) for _ in range(2)]
            mapped = map_file(path)
    assert two == []
    (region,) = one
    assert region_bytes(region, 5, 3 * mmap.PAGESIZE) is not None
    assert region_bytes(region, 5, 9 * mmap.PAGESIZE) is None
    assert region_bytes(region._replace(offset=100), 5, 50) is None
    for opened_map in (first, *rest):
        opened_map.close()
    assert len(before) == len(mapped)


# --- which parts -----------------------------------------------------------------------------------------------


def test_sequences_computed_together_are_as_alone(decoder: Decoder) -> None:
    beginnings = [tokens(20, 1), tokens(9, 2), tokens(40, 3)]
    decoder.step([SequenceChunk(1, tokens(30, 4))])
    together = decoder.step(
        [SequenceChunk(s, ids, wants_logits=s != 2) for s, ids in enumerate(beginnings)] + [SequenceChunk(3, [7])]
    )
    assert [decoder.is_local(row) for row in together] == [True, True, False, False]
    logits = [decoder.logits(row) for row in (together[0], together[1], together[3])]
    assert [decoder.held(s) for s in range(4)] == [20, 39, 40, 1]
    for s in range(4):
        decoder.rewind(s)
    decoder.step([SequenceChunk(1, tokens(30, 4))])
    alone = [
        decoder.logits(decoder.step([part])[0])
        for part in (SequenceChunk(0, beginnings[0]), SequenceChunk(1, beginnings[1]))
    ]
    np.testing.assert_array_equal(logits[:2], alone)
    assert error(logits[2], decoder.logits(decoder.step([SequenceChunk(4, [7])])[0])) < 1e-3


@pytest.mark.parametrize(
    ("parts", "adapter", "expected"),
    [
        ([("first", MIN_ROWS)], None, True),
        ([("first", MIN_ROWS - 1)], None, False),
        ([("first", 1)] * 12, None, False),
        ([("spare", 20)], None, False),
    ],
)
def test_short_parts_go_to_llama_cpp(decoder: Decoder, parts: Any, adapter: str | None, expected: bool) -> None:
    places = iter(range(8))
    made = [
        SequenceChunk(decoder.n_sequences if where == "spare" else next(places), tokens(n)) for where, n in parts[:8]
    ]
    assert [decoder.is_local(row) for row in decoder.step(made, adapter=adapter)] == [expected] * len(made)


def test_a_long_past_goes_to_llama_cpp(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder.step([SequenceChunk(0, tokens(50))])
    position_bytes = decoder._prefill.form.position_bytes  # type: ignore[union-attr]
    for held, expected in ((50, True), (70, False)):
        monkeypatch.setattr("edge_runtime.decoder.prefill_routing.MAX_PAST_BYTES", 60 * position_bytes)
        assert decoder.held(0) == held
        (row,) = decoder.step([SequenceChunk(0, tokens(20))])
        assert decoder.is_local(row) == expected


@needs_amx
@pytest.mark.parametrize(
    "options", [{"exact": True}, {"kv_type": "q8_0"}, {"repack": True}, {"amx_prefill": False}, {}]
)
def test_where_it_does_not_go_or_does_not_pay_llama_cpp_computes_all(options: dict[str, Any]) -> None:
    found = open_decoder(**{"amx_prefill": True, **options} if options else {})
    assert not found.uses_amx_prefill
    found.close()


def test_files_that_cannot_be_read_here(tmp_path: Path, checkpoint: Path) -> None:
    from edge_converters import convert_checkpoint

    assert supports_amx_prefill(GGUFFile(DEMO)) == IS_POSSIBLE
    files = convert_checkpoint(checkpoint, tmp_path, decoder_type="f16")  # neither the type nor the widths
    assert not supports_amx_prefill(GGUFFile(files.decoder))


# --- errors ----------------------------------------------------------------------------------------------------


def test_a_cancelled_prompt_leaves_nothing(decoder: Decoder) -> None:
    decoder.step([SequenceChunk(0, tokens(30)), SequenceChunk(1, tokens(5))])
    asked = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 1

    decoder.step([SequenceChunk(2, tokens(10))])
    with pytest.raises(Cancelled):
        decoder.step(
            [SequenceChunk(0, tokens(40)), SequenceChunk(2, tokens(40, 1)), SequenceChunk(1, [9])], cancelled
        )
    assert [decoder.held(s) for s in range(3)] == [30, 5, 10]
    decoder.step([SequenceChunk(0, tokens(40)), SequenceChunk(1, [9])])
    assert [decoder.held(s) for s in range(3)] == [70, 6, 10]


def test_a_full_cache_leaves_nothing(amx: str) -> None:
    found = Decoder(DEMO, DecoderOptions(n_ctx=256))
    try:
        assert found.uses_amx_prefill
        found.step([SequenceChunk(0, tokens(200))])
        with pytest.raises(CacheFull):
            found.step([SequenceChunk(1, tokens(30)), SequenceChunk(2, tokens(40)), SequenceChunk(0, [5])])
        assert [found.held(s) for s in range(3)] == [200, 0, 0]
        (row,) = found.step([SequenceChunk(1, tokens(50))])
        assert found.is_local(row)
    finally:
        found.close()


def test_a_form_that_llama_cpp_does_not_take(amx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a future version of it might: then it computes prompts itself."""

    def refused(*arguments: Any) -> None:
        raise CacheFull("another form")

    monkeypatch.setattr(Decoder, "append_rows", refused)
    found = open_decoder()
    assert not found.uses_amx_prefill
    found.close()


# --- the engine ------------------------------------------------------------------------------------------------

QUESTIONS = ["What does it say?", "Is there a circle in the picture?", "What is in the picture?"]


@pytest.fixture
def pair(amx: str) -> Iterator[Callable[..., list[Any]]]:
    """Ask two models, of which one computes prompts itself, and tell both answers."""
    with Model.load("demo", n_ctx=1024) as mine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "MIN_FILE_BYTES", 1 << 60)
        with Model.load("demo", n_ctx=1024) as other:
            assert (mine.engine.decoder.uses_amx_prefill, other.engine.decoder.uses_amx_prefill) == (True, False)

            def ask(*arguments: Any, **options: Any) -> list[Any]:
                return [model.chat(*arguments, **options) for model in (mine, other)]

            yield ask


def test_answers_are_the_same(pair: Callable[..., list[Any]]) -> None:
    for question in QUESTIONS:
        mine, other = pair([{"role": "user", "content": [SIGN, question]}], greedy=True)
        assert mine.answer == other.answer
        assert mine.prompt_tokens == other.prompt_tokens
    assert pair([{"role": "user", "content": [SIGN, QUESTIONS[0]]}])[0].cached_tokens > 20


def test_every_way_of_answering_works(pair: Callable[..., list[Any]]) -> None:
    """Samplers, searches, scores, forms: all of them begin with the logits of the prompt."""
    asked = [{"role": "user", "content": [SIGN, QUESTIONS[0]]}]
    for options in (
        {"seed": 3},
        {"beams": 3},
        {"greedy": True, "logprobs": True, "top_logprobs": 3},
        {"greedy": True, "schema": {"type": "object", "properties": {"word": {"type": "string"}}}},
        {"thinking": True, "thinking_budget": 4, "greedy": True},
        {"greedy": True, "logit_bias": {5: -100}, "repetition_penalty": 1.1},
    ):
        mine, other = pair(asked, max_tokens=12, **options)
        if "seed" not in options:
            assert mine.answer == other.answer, options
        assert mine.completion_tokens
        if options.get("logprobs"):
            for one, another in zip(mine.logprobs, other.logprobs, strict=True):
                assert abs(one.logprob - another.logprob) < 0.05


def test_a_conversation_goes_on(amx: str) -> None:
    with Model.load("demo", n_ctx=1024) as model:
        messages: list[Any] = [{"role": "user", "content": [SIGN, QUESTIONS[0]]}]
        first = model.chat(messages, greedy=True, follow_up=True)
        messages += [first.message(), {"role": "user", "content": QUESTIONS[1]}]
        second = model.chat(messages, greedy=True)
        assert second.cached_tokens > first.prompt_tokens - 20
        assert second.answer == model.chat(messages, greedy=True).answer


def test_requests_at_once_and_one_that_leaves(amx: str) -> None:
    with Model.load("demo", n_ctx=2048) as model:
        asked = [[{"role": "user", "content": [SIGN, f"{n}. {QUESTIONS[n % 3]}"]}] for n in range(6)]
        alone = [model.chat(one, greedy=True, max_tokens=8).answer for one in asked]
        streams = [model.chat(one, greedy=True, max_tokens=8, stream=True) for one in asked]
        streams[2].cancel()
        found = [stream.result().answer for stream in streams]
        assert [text for n, text in enumerate(found) if n != 2] == [text for n, text in enumerate(alone) if n != 2]
        assert threading.active_count() < 100


def test_what_is_copied_is_reckoned_with(amx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 1024 * 2 * 2 * 3 * 2 * 64  # positions, keys and values, bytes, layers, heads, numbers
    file, encoder = GGUFFile(DEMO), ImageEncoder(DEMO.parent / "mmproj-model-q8_0.gguf", exact=False)
    with_amx = estimate_memory(file, encoder, 1024, exact=False).compute
    assert with_amx - estimate_memory(file, encoder, 1024, exact=False, repack=True).compute == copied
    assert with_amx - estimate_memory(file, encoder, 1024, exact=True).compute == copied
    monkeypatch.setattr("edge_runtime.loading.memory_needs.MAX_PAST_BYTES", 1000)
    assert with_amx - estimate_memory(file, encoder, 1024, exact=False).compute == copied - 1000


def resident_pages(region: Region) -> int:
    """Pages of a mapping that count as this process's memory."""
    told = Path("/proc/self/smaps").read_text("utf-8").split(f"{region.begin:x}-{region.end:x} ", 1)[1]
    return int(told.split("Rss:", 1)[1].split()[0]) * 1024 // mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_a_part_of_a_mapping_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    path, page = tmp_path / "file", mmap.PAGESIZE
    content = bytes(i % 251 for i in range(8 * page))
    path.write_bytes(content)
    with path.open("rb") as opened, watched(path) as found:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    (region,) = found
    assert mapped[:] == content
    assert resident_pages(region) == 8
    release_region(region, page + 1, 6 * page - 1)  # two pages of it in part
    assert resident_pages(region) == 5
    for first, end in ((page, 99 * page), (3 * page - 5, 3 * page + 5), (-9 * page, page)):
        release_region(region, first, end)  # not within it, or no whole page
    assert resident_pages(region) == 5
    assert mapped[:] == content
    assert resident_pages(region) == 8
    mapped.close()
