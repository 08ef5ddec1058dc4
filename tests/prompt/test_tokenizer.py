"""The tokenizer against the `tokenizers` library on the fixture's own tokenizer.json, and on the real vocabulary."""

from __future__ import annotations

import json
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Official

from conftest import FIXTURES, SHARED
from edge_converters.output.gguf_writer import write_gguf
from edge_converters.output.vocabulary import read_vocabulary
from edge_converters.plan.planned_tensor import PlannedTensor
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime import Model
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.weights.gguf_file import GGUFFile

MARK = "\ue000"
TEXTS = [
    "Hello world", "  leading and   inner ", "tabs\tand\r\nnewlines\n\n\nend", "It's 1234567.89!", "图片里有什么？",
    "cafe\u0301",
    "👩‍👩‍👧 family", "\u202eright\u202c", "a\u00a0b", "<unk>", "<|im_end|>", "<think>ah</think>", "x<image>y",
    "", " ", "\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def official() -> Official:
    return Official.from_file(str(FIXTURES / "checkpoint" / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer(exact_model: Model) -> Tokenizer:
    return exact_model.tokenizer


def test_text_equals_the_official_tokenizer(official: Official, tokenizer: Tokenizer):
    for text in TEXTS:
        assert tokenizer.encode_special(text, MARK) == official.encode(text).ids, text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=MARK), max_size=40))
def test_any_text_equals_the_official_tokenizer(official: Official, tokenizer: Tokenizer, text):
    assert tokenizer.encode_special(text, MARK) == official.encode(text).ids


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_plain_text_survives_the_round_trip(tokenizer: Tokenizer, text):
    """Ids of plain text spell its NFC form, and none of them is a special token."""
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == unicodedata.normalize("NFC", text)
    assert not set(ids) & set(tokenizer.special_ids.values())


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_either_token_of_the_official_configuration_ends_an_answer(exact_model: Model, token):
    """Both are in `generation_config.json`; the vocabulary names only one of them as its end."""
    tokenizer = exact_model.tokenizer
    token_id = tokenizer.special_ids[token]
    assert tokenizer.stop_ids == {tokenizer.special_ids["<|im_end|>"], tokenizer.special_ids["<|endoftext|>"]}
    answer = exact_model.chat("Why?", greedy=True, max_tokens=5, logit_bias={token_id: 100.0})
    assert (answer.answer, answer.finish_reason, answer.completion_tokens) == ("", "stop", 1)


@pytest.mark.parametrize("special", ["<image>", "<|im_end|>", "<think>", "<tool_call>", "<unk>", "</slice>"])
def test_guarded_special_tokens_are_text(tokenizer: Tokenizer, special):
    guarded = tokenizer.guard(f"a{special}b", MARK)
    ids = tokenizer.encode_special(guarded, MARK)
    assert ids == tokenizer.encode(f"a{special}b")
    assert tokenizer.special_ids[special] not in ids


def test_runs_between_special_tokens_are_tokenised_whole(tokenizer: Tokenizer):
    """The template's newline and the user's text merge as they would in one string."""
    begin = tokenizer.special_ids["<|im_start|>"]
    assert tokenizer.encode_special("<|im_start|>user\n\n the<think>", MARK) == [
        begin,
        *tokenizer.encode("user\n\n the"),
        tokenizer.special_ids["<think>"],
    ]


@given(
    text=st.text(
        alphabet=st.one_of(st.characters(), st.sampled_from("ae\u0301\u0308\u1100\u1161\u11a8<>")), max_size=400
    )
)
def test_text_becomes_no_fewer_tokens_than_the_lower_bound(demo: Model, text: str):
    """Normalisation shortens text: a syllable's three bytes may have been nine bytes of letters."""
    found = demo.tokenizer
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace(MARK, "")
    marked = f"<|im_start|>{found.guard(text, MARK)}<|im_end|>"
    assert found.min_n_tokens(marked, MARK) <= len(found.encode_special(marked, MARK)) - 2


def test_long_text_is_the_same_tokens_and_its_bound_is_exact(demo: Model):
    found = demo.tokenizer
    word = max((t for t in found.tokens if t.isascii() and t.isalpha()), key=len)
    assert found.min_n_tokens(word * 10, MARK) * found._longest >= len(word) * 10
    text = "an apple, 7 pears; " * 2000
    pieces = [found.encode(text[i : i + 19]) for i in range(0, len(text), 19)]
    assert found.token_bytes(found.encode(text)[0])
    assert b"".join(map(found.token_bytes, found.encode(text))) == text.encode()
    assert len(found.encode(text)) <= sum(map(len, pieces))


def test_long_text_does_not_block_other_threads(demo: Model):
    """Tokenised as a single text, it held the GIL for seconds."""
    demo.tokenizer.encode("warm")
    working = threading.Thread(target=demo.tokenizer.encode, args=("a " * 700_000,))
    working.start()
    turns = 0
    while working.is_alive():
        time.sleep(0.005)
        turns += 1
    assert turns > 10


def test_rows_without_a_token_print_nothing(demo: Model):
    unused = [i for i, kind in enumerate(demo.tokenizer.types) if kind == 5]
    assert len(unused) == 512 - 507
    assert all(demo.tokenizer.token_bytes(i) == b"" for i in unused)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real vocabulary is not committed; it lies in ../shared only")
def test_the_real_vocabulary(tmp_path: Path):
    """Ids of the real model's strings, the normalisation to NFC included."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in (FIXTURES / "checkpoint").iterdir():
        if not file.name.startswith(("vocab", "merges", "added", "special", "tokenizer")):
            (folder / file.name).symlink_to(file)
    for file in (SHARED / "reference" / "tokenizer").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 151645, "bos_token_id": 151643}))
    vocabulary = read_vocabulary(Checkpoint(folder), 151748)
    one = PlannedTensor("x", (1, 32), GGMLQuantizationType.F32, lambda a, b: np.zeros((b - a, 32), np.float32))
    write_gguf(tmp_path / "vocabulary.gguf", "qwen3", vocabulary.write, [one], lambda n: None)
    tokenizer = Tokenizer(GGUFFile(tmp_path / "vocabulary.gguf"))
    assert tokenizer.stop_ids == {151643, 151645}
    for entry in json.loads((FIXTURES / "goldens" / "real_tokenizer.json").read_text()):
        assert tokenizer.encode_special(entry["text"], MARK) == entry["ids"], entry["text"]
