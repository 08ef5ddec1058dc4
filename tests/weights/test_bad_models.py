"""Model files that are missing, damaged or of another model: one sentence from the library and the command line."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from edge_runtime import Model
from edge_runtime.errors import (
    EdgeRuntimeError,
    MessageError,
    ModelFileError,
    PromptTooLongError,
    UnsupportedModelError,
)
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.store.find import find_model
from edge_runtime.weights.gguf_file import GGUFFile
from support import gguf_maker as make
from support.command import refused
from support.gguf_maker import Gguf, mini_decoder, mini_mmproj

DECODER, MMPROJ = "decoder.gguf", "mmproj.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound tiny model."""
    mini_decoder().write(tmp_path / DECODER)
    mini_mmproj().write(tmp_path / MMPROJ)
    return tmp_path


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def decoder(change: Callable[[Gguf], object]) -> Callable[[Path], None]:
    """Write the tiny decoder with a change."""

    def write(folder: Path) -> None:
        file = mini_decoder()
        change(file)
        file.write(folder / DECODER)

    return write


def mmproj(change: Callable[[Gguf], object]) -> Callable[[Path], None]:
    """Write the tiny mmproj file with a change."""

    def write(folder: Path) -> None:
        file = mini_mmproj()
        change(file)
        file.write(folder / MMPROJ)

    return write


def number(key: str, value: int) -> Callable[[Path], None]:
    return decoder(lambda f: f.key(key, make.U32, value))


def tokens(*replacements: tuple[int, str]) -> Callable[[Path], None]:
    texts = [f"t{i}" for i in range(make.VOCABULARY)]
    for place, text in replacements:
        texts[place] = text
    return decoder(lambda f: f.array("tokenizer.ggml.tokens", make.STRING, texts))


def drop(tensor: str) -> Callable[[Path], None]:
    write = mmproj if tensor.startswith(("v.", "resampler.")) else decoder
    return write(lambda file: file.tensors.pop(tensor))


def beyond_the_end(file: Gguf) -> None:
    file.tensors["output_norm.weight"].offset = 1 << 30


def integers(name: str, *dims: int) -> dict[str, make.Tensor]:
    return {name: make.Tensor(name, dims, int(Type.I8), bytes(int(np.prod(dims))))}


def swap(folder: Path) -> None:
    mini_decoder().write(folder / MMPROJ)
    mini_mmproj().write(folder / DECODER)


def noise(_: bytes) -> bytes:
    return np.random.default_rng(0).bytes(100_000)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    # the files
    "missing folder": (lambda f: shutil.rmtree(f), "neither 'demo' nor an existing folder or file"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "holds no decoder file"),
    "missing mmproj": (lambda f: (f / MMPROJ).unlink(), "holds no mmproj file .*into one folder"),
    "missing decoder": (lambda f: (f / DECODER).unlink(), "holds no decoder file"),
    "two decoders": (
        lambda f: mini_decoder().write(f / "b.gguf"),
        r"2 decoder files \(b.gguf, decoder.gguf\).*-m FILE",
    ),
    "two mmproj files": (lambda f: mini_mmproj().write(f / "b-mmproj.gguf"), "2 mmproj files .*--mmproj FILE"),
    "empty decoder": (rewrite(DECODER, lambda b: b""), "has 0 bytes, too few"),
    "text file": (
        rewrite(DECODER, lambda b: b"This is no model at all.\n"),
        "starts with b'This' instead of b'GGUF'",
    ),
    "random bytes": (rewrite(DECODER, noise), "instead of b'GGUF'"),
    "random bytes after the magic": (rewrite(DECODER, lambda b: b"GGUF" + noise(b)), "has version"),
    "decoder without its last byte": (rewrite(DECODER, lambda b: b[:-1]), "it is cut short"),
    "half a decoder": (rewrite(DECODER, lambda b: b[: len(b) // 2]), "it is cut short"),
    "half a decoder header": (rewrite(DECODER, lambda b: b[:1000]), "it ends inside|announces"),
    "half an mmproj": (rewrite(MMPROJ, lambda b: b[: len(b) // 2]), "mmproj.gguf .*it is cut short"),
    "random mmproj": (rewrite(MMPROJ, noise), "mmproj.gguf .*instead of b'GGUF'"),
    "a tensor past the end": (decoder(beyond_the_end), "output_norm.weight needs bytes"),
    "part of a split model": (
        decoder(lambda f: f.key("split.count", make.U16, 3)),
        "one part of a split model, expected a single file",
    ),
    # another model
    "another decoder": (
        decoder(lambda f: f.key("general.architecture", make.STRING, "llama")),
        "architecture 'llama', expected 'qwen3'",
    ),
    "files swapped": (swap, "architecture 'qwen3', expected 'clip'"),
    "another projector": (
        mmproj(lambda f: f.key("clip.projector_type", make.STRING, "mlp")),
        "projector 'mlp' of MiniCPM-V version 6, expected 'resampler'",
    ),
    "MiniCPM-V 2.6": (
        mmproj(lambda f: f.key("clip.minicpmv_version", make.U32, 3)),
        "version 3, expected 'resampler'",
    ),
    "widths that differ": (
        lambda f: mini_mmproj(256).write(f / MMPROJ),
        "decoder.gguf has hidden size 128, but the visual tokens of mmproj.gguf have 256",
    ),
    "another tokenizer": (
        decoder(lambda f: f.key("tokenizer.ggml.model", make.STRING, "llama")),
        "tokenizer of kind llama/qwen2, expected gpt2/qwen2",
    ),
    # decoders over which llama.cpp would abort the process
    "token twice": (tokens((3, "t9")), "the token 't9' more than once"),
    "empty token": (tokens((3, "")), r"an empty token \(id 3\)"),
    "tokens equal up to a zero byte": (tokens((3, "t9\0a")), r"with a zero byte \(id 3\)"),
    "wrong number of token types": (
        decoder(lambda f: f.array("tokenizer.ggml.token_type", make.I32, [1])),
        "64 tokens but 1 token types",
    ),
    "token types as text": (
        decoder(lambda f: f.key("tokenizer.ggml.token_type", make.STRING, "normal")),
        "token_type holds text, 'normal', expected a list of numbers",
    ),
    "end token out of range": (number("tokenizer.ggml.eos_token_id", 64), "eos_token_id is 64, expected 0 to 63"),
    "no heads": (number("qwen3.attention.head_count", 0), "head_count is 0, expected 1 to"),
    "no key/value heads": (number("qwen3.attention.head_count_kv", 0), "head_count_kv is 0, expected 1 to"),
    "heads that do not divide": (
        number("qwen3.attention.head_count", 3),
        "1 key/value heads|llama.cpp refuses decoder.gguf",
    ),
    "too many layers": (number("qwen3.block_count", 513), "block_count is 513, at most 512"),
    "a layer too many": (number("qwen3.block_count", 2), "llama.cpp refuses decoder.gguf: .*blk.1"),
    "rope of another width": (number("qwen3.rope.dimension_count", 16), "expected one even number"),
    "negative epsilon": (
        decoder(lambda f: f.key("qwen3.attention.layer_norm_rms_epsilon", make.F32, -1.0)),
        "epsilon is -1.0, expected a positive number",
    ),
    "unknown rope scaling": (
        decoder(lambda f: f.key("qwen3.rope.scaling.type", make.STRING, "magic")),
        "rope.scaling.type is 'magic', expected one of none, linear",
    ),
    "experts": (number("qwen3.expert_count", 8), "has the setting 'qwen3.expert_count'"),
    "a norm in float16": (
        decoder(lambda f: f.tensor("output_norm.weight", (make.HIDDEN,), Type.F16)),
        "'output_norm.weight' is stored as F16, expected F32",
    ),
    "a matrix of integers": (
        decoder(lambda f: f.tensors.update(integers("blk.0.ffn_up.weight", 128, 32))),
        "'blk.0.ffn_up.weight' is stored as I8, expected F32, F16, BF16 or a quantised type",
    ),
    "embeddings of integers": (
        decoder(lambda f: f.tensors.update(integers("token_embd.weight", 128, 64))),
        "'token_embd.weight' is stored as I8",
    ),
    "embeddings of another size": (
        number("qwen3.embedding_length", 96),
        r"token_embd.weight has shape \(64, 128\), expected \(64, 96\)",
    ),
    # incomplete files
    "a key missing": (decoder(lambda f: f.keys.pop("qwen3.block_count")), "the key qwen3.block_count is missing"),
    "a key of another type": (
        decoder(lambda f: f.key("qwen3.context_length", make.STRING, "long")),
        "context_length holds text, 'long', expected a whole number",
    ),
    "a decoder tensor missing": (drop("blk.0.ffn_up.weight"), "llama.cpp refuses decoder.gguf: .*ffn_up"),
    "a vision tensor missing": (drop("v.blk.0.ln1.bias"), "the tensor v.blk.0.ln1.bias is missing"),
    "a resampler tensor missing": (drop("resampler.proj.weight"), "the tensor resampler.proj.weight is missing"),
    "a row length of another model": (
        mmproj(lambda f: f.key("edge_runtime.row_length.v.blk.0.ffn_up.weight", make.U32, 48)),
        r"the tensor v.blk.0.ffn_up.weight has shape \(32, 48\), expected \(32, 40\)",
    ),
    "padded rows of an unknown length": (
        mmproj(lambda f: f.keys.pop("edge_runtime.row_length.v.blk.0.ffn_up.weight")),
        r"the tensor v.blk.0.ffn_up.weight has shape \(32, 64\), expected \(32, 40\)",
    ),
    "a row length beyond the row": (
        mmproj(lambda f: f.key("edge_runtime.row_length.v.blk.0.ffn_up.weight", make.U32, 65)),
        "ffn_up.weight holds 65, expected more than 32 and less than 64",
    ),
    "positions of another width": (
        mmproj(lambda f: f.tensor("v.position_embd.weight", (16, 64))),
        r"v.position_embd.weight has shape \(16, 64\), expected \(16, 32\)",
    ),
    "positions that form no square": (
        mmproj(lambda f: f.tensor("v.position_embd.weight", (15, 32))),
        "has 15 rows, expected a square number",
    ),
    "a mean of two numbers": (
        mmproj(lambda f: f.array("clip.vision.image_mean", make.F32, [0.5, 0.5])),
        "expected three numbers",
    ),
    "a mean of text": (
        mmproj(lambda f: f.array("clip.vision.image_mean", make.STRING, ["a", "b", "c"])),
        "expected a list of numbers",
    ),
    "a deviation of zero": (
        mmproj(lambda f: f.array("clip.vision.image_std", make.F32, [0.5, 0.0, 0.5])),
        "image_std holds a zero",
    ),
    "an epsilon that is no number": (
        mmproj(lambda f: f.key("clip.vision.attention.layer_norm_epsilon", make.F32, float("nan"))),
        "expected a positive number",
    ),
}


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_refused_by_the_library_and_the_command(case: str, folder: Path) -> None:
    damage, reason = BAD[case]
    damage(folder)
    before = contents(folder)
    with pytest.raises(ModelFileError, match=reason) as refusal:
        Model.load(folder)
    line = refused(["run", "-m", str(folder), "Hello"], reason)
    assert line == f"edge-runtime: {refusal.value}"
    assert len(line) < 600
    assert contents(folder) == before, "nothing is written"


def test_the_unchanged_model_answers(folder: Path) -> None:
    """Without this, the refusals above might all have another cause."""
    with Model.load(folder) as model:
        assert model.chat("an apple", greedy=True, max_tokens=3).completion_tokens


@pytest.mark.parametrize("command", ["run", "info"])
def test_a_file_as_model(command: str, tmp_path: Path) -> None:
    arguments = ["-m"] if command == "run" else []
    refused(
        [command, *arguments, str(tmp_path / "absent.gguf"), *(["Hello"] if arguments else [])], "nor an existing"
    )
    (tmp_path / "mmproj.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0))
    (tmp_path / "a.gguf").write_bytes(b"short")
    reason = "announces 9223372036854775808 tensors|too few"
    refused([command, *arguments, str(tmp_path / "a.gguf"), *(["Hello"] if arguments else [])], reason)


def test_naming_a_missing_mmproj(folder: Path) -> None:
    refused(
        ["run", "-m", str(folder), "--mmproj", str(folder / "absent.gguf"), "Hello"], "absent.gguf does not exist"
    )


def test_several_candidates_can_be_told_apart(folder: Path) -> None:
    other = mini_mmproj().write(folder / "b-mmproj.gguf")
    assert find_model(folder, mmproj=other).mmproj == other
    (folder / "b.gguf").write_bytes(b"")
    assert find_model(folder / DECODER, mmproj=other).decoder == folder / DECODER


def test_a_name_with_a_zero_byte() -> None:
    with pytest.raises(ModelFileError, match="nor an existing folder or file"):
        Model.load("a\0b")


def test_a_prompt_longer_than_the_context(folder: Path) -> None:
    reason = r"The prompt has \d+ tokens, but the context holds \d+ .*larger --ctx"
    with Model.load(folder) as model:
        with pytest.raises(PromptTooLongError, match=reason):
            model.chat("apple " * 500)
        assert model.chat("an apple", greedy=True, max_tokens=2).completion_tokens, "the model stays usable"
    refused(["run", "-m", str(folder), "apple " * 500], reason)
    refused(["run", "--ctx", "20", "What do you see in the picture that I did not even give to you?"], reason)


@pytest.mark.parametrize("merge", ["a", "a b c", "", "a zz", "a b"])
def test_a_merge_that_joins_nothing(merge: str, folder: Path) -> None:
    decoder(lambda f: f.array("tokenizer.ggml.merges", make.STRING, [merge]))(folder)
    with pytest.raises(ModelFileError, match="which does not join two tokens"):
        Tokenizer(GGUFFile(folder / DECODER)).encode("an apple")
    refused(["run", "-m", str(folder), "Hello"], "which does not join two tokens")


def test_an_unknown_normalizer(folder: Path) -> None:
    decoder(lambda f: f.key("edge_runtime.tokenizer.normalizer", make.STRING, "nfd"))(folder)
    with pytest.raises(UnsupportedModelError, match="is 'nfd', expected 'nfc' or 'none'"):
        Model.load(folder)


def test_a_failed_load_can_be_repeated(folder: Path) -> None:
    """A refused model leaves nothing behind that affects the next one."""
    whole = (folder / DECODER).read_bytes()
    for _ in range(3):
        drop("blk.0.ffn_up.weight")(folder)
        with pytest.raises(EdgeRuntimeError):
            Model.load(folder)
        (folder / DECODER).unlink()
        (folder / DECODER).write_bytes(whole)
        Model.load(folder).close()


@pytest.mark.parametrize("template", ["{{ '' }}", "{# nothing #}", "{% for m in [] %}x{% endfor %}"])
def test_a_template_that_renders_to_nothing(folder: Path, template: str) -> None:
    """A prompt of no tokens is refused before anything divides by their number; raw prompts are answered."""
    mini_decoder().key("tokenizer.chat_template", make.STRING, template).write(folder / DECODER)
    with Model.load(folder) as model:
        for ask in (model.chat, model.build_prompt):
            with pytest.raises(MessageError, match="The prompt is empty: the model's chat template makes nothing of"):
                ask("an apple")
        with pytest.raises(MessageError, match="The raw prompt is empty"):
            model.chat("", raw=True)
        assert model.chat("an apple", raw=True, max_tokens=2).completion_tokens
