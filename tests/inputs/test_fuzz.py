"""Damaged files by the thousand: only our own errors come out, and llama.cpp never ends the process."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.errors import EdgeRuntimeError, ImageError
from edge_runtime.inputs.image import load_image
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.weights.config import check_mmproj, decoder_config, resampler_config, slicing_config, vision_config
from edge_runtime.weights.gguf_file import GGUFFile
from support.gguf_maker import BOOL, CODES, F32, I32, STRING, U32, VOCABULARY, Gguf, Tensor, mini_decoder, mini_mmproj
from support.gguf_maker import scalar as encode

WHOLE = [mini_decoder().build(), mini_mmproj().build()]
HEADERS = [len(mini_decoder().header()), len(mini_mmproj().header())]
BOUNDARIES = [0, 1, 2, 7, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1]
SLOWEST_CASE_S = 1.0


def damaged(rng: random.Random) -> bytes:
    """A sound file with one to three damaged places in its header."""
    which = rng.randrange(2)
    data, header = bytearray(WHOLE[which]), HEADERS[which]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(min(header, len(data)))
        match rng.choice(["byte", "flip", "number", "cut", "delete", "insert", "copy"]):
            case "byte":
                data[place] = rng.randrange(256)
            case "flip":
                data[place] ^= 1 << rng.randrange(8)
            case "number":
                data[place : place + 8] = struct.pack("<Q", rng.choice(BOUNDARIES))
            case "cut":
                del data[place + 1 :]
            case "delete":
                del data[place : place + rng.randint(1, 32)]
            case "insert":
                data[place:place] = rng.randbytes(rng.randint(1, 16))
            case "copy":
                start = rng.randrange(header)
                data[place:place] = data[start : start + rng.randint(1, 64)]
        data = data or bytearray(b"G")
    return bytes(data)


def read_everything(path: Path) -> None:
    """Everything that the runtime reads from a file before llama.cpp or a kernel gets it."""
    file = GGUFFile(path)
    for name in file.tensors:
        file.blocks(name).max()  # touches every byte: a wrong bound would end the process
    if file.metadata.get("general.architecture") == "clip":
        check_mmproj(file)
        slicing_config(file), vision_config(file), resampler_config(file)
    else:
        decoder_config(file)
        tokenizer = Tokenizer(file)
        tokenizer.token_bytes(0)
        tokenizer.encode("an apple")
        file.rows("token_embd.weight", np.array([0, VOCABULARY - 1]))


@pytest.mark.slow
def test_damaged_files_raise_only_our_errors(tmp_path: Path) -> None:
    path, slowest, outcomes = tmp_path / "damaged.gguf", 0.0, {"read": 0, "refused": 0}

    @settings(
        max_examples=10_000,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))  # one seed per case: a drawn byte each costs 5 ms
    def fuzz(rng: random.Random) -> None:
        nonlocal slowest
        path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
        path.write_bytes(damaged(rng))
        started = time.thread_time()  # of this thread alone: others may have the core for a second
        try:
            read_everything(path)
            outcomes["read"] += 1
        except EdgeRuntimeError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 1000
            outcomes["refused"] += 1
        slowest = max(slowest, time.thread_time() - started)

    before = peak_bytes()
    fuzz()
    assert sum(outcomes.values()) >= 9_000, outcomes
    assert min(outcomes.values()) > 100, f"the wounds are all fatal, or all harmless: {outcomes}"
    assert slowest < SLOWEST_CASE_S
    assert peak_bytes() - before < 100e6


def peak_bytes() -> int:
    """Peak memory of this process; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def test_the_files_are_sound_before_they_are_damaged(tmp_path: Path) -> None:
    for data in WHOLE:
        (tmp_path / "sound.gguf").write_bytes(data)
        read_everything(tmp_path / "sound.gguf")
        (tmp_path / "sound.gguf").unlink()


# --- pictures ----------------------------------------------------------------------------------------------------


def sound_pictures() -> list[bytes]:
    """One small picture in every format whose parser fails in its own way."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.init()  # knows all formats only then
    encoded = []
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "ICO", "TGA", "DDS", "AVIF", "SPIDER"):
        if kind in Image.SAVE:
            options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
            out = io.BytesIO()
            Image.fromarray(pixels).convert("F" if kind == "SPIDER" else "RGB").save(out, kind, **options)
            encoded.append(out.getvalue())
    return encoded


def test_damaged_pictures_raise_only_our_errors() -> None:
    """Pillow raises RuntimeError, struct.error, AttributeError and more; we do not."""
    rng, pictures, outcomes = random.Random(0), sound_pictures(), {"decoded": 0, "refused": 0}
    for _ in range(10_000):
        data = bytearray(rng.choice(pictures))
        for _ in range(rng.choice([1, 2, 5])):
            place = rng.randrange(min(len(data), rng.choice([60, 300, 10_000])))
            data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(5))
        try:
            load_image(bytes(data), pixel_limit=1_000_000)
            outcomes["decoded"] += 1
        except ImageError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 500, outcomes


# --- the whole load, llama.cpp included -------------------------------------------------------------------------

N_CASES = 1000
TEXTS = ["", "a", "none", "linear", "yarn", "llama", "qwen2", "é", "x" * 300, "a\0b"]
FLOATS = [0.0, -1.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3e38]
MORE_KEYS = ["expert_count", "expert_used_count", "expert_group_count", "nextn_predict_layers", "pooling_type"]
MORE_KEYS += ["attention.causal", "rope.scaling.type", "rope.scaling.factor", "rope.dimension_sections", "vocab_size"]
ODD_TOKENS = ["", "a", "\n", " ", "a\0b", "日本", "[EMPTY_3]", "<0x0A>", "x" * 5000, "<|end|>", "</s>", "unused"]
ODD_MERGES = ["Ġ a", "a n", "", "a", " ", "a b c", " a", "a ", "Ċ Ċ"]


def random_value(rng: random.Random, kind: int) -> bytes:
    if kind == STRING:
        return encode(kind, rng.choice(TEXTS))
    if kind == BOOL:
        return encode(kind, rng.randrange(3))
    if CODES[kind] in "fd":
        return encode(kind, rng.choice(FLOATS))
    size = struct.calcsize(CODES[kind])
    return struct.pack("<Q", rng.choice(BOUNDARIES))[:size]


def altered_decoder(seed: int) -> bytes:
    """A decoder that is a well-formed file with odd contents: the part that llama.cpp trusts."""
    rng, file = random.Random(seed), mini_decoder()
    key, tensor = rng.choice(list(file.keys)), rng.choice(list(file.tensors.values()))
    kind = file.keys[key][0]
    match rng.randrange(8):
        case 0:
            if kind in CODES or kind == STRING:
                file.keys[key] = (kind, random_value(rng, kind))
        case 1:
            kind = rng.choice([*CODES, STRING])
            file.keys[key] = (kind, random_value(rng, kind))
        case 2:
            file.keys[f"qwen3.{rng.choice(MORE_KEYS)}"] = (U32, random_value(rng, U32))
        case 3:
            replace_tokens(file, rng)
        case 4:
            types = [rng.randrange(8) for _ in range(VOCABULARY - rng.choice([0, 0, 1]))]
            file.array("tokenizer.ggml.token_type", rng.choice([I32, I32, U32, F32]), types)
        case 5:
            file.array("tokenizer.ggml.merges", STRING, rng.choices(ODD_MERGES, k=4))
        case 6:
            change_type(tensor, rng)
        case 7:
            tensor.dims = rng.choice([tensor.dims[::-1], (*tensor.dims, 1)])
            tensor.name = rng.choice([tensor.name, "output.weight", "blk.0.attn_q.bias", "blk.1.attn_q.weight"])
    return file.build()


def replace_tokens(file: Gguf, rng: random.Random) -> None:
    tokens = [f"t{i}" for i in range(VOCABULARY)]
    for place in rng.sample(range(VOCABULARY), 3):
        tokens[place] = rng.choice([*ODD_TOKENS, "t0"])
    file.array("tokenizer.ggml.tokens", STRING, tokens)
    file.array("tokenizer.ggml.merges", STRING, [])


def change_type(tensor: Tensor, rng: random.Random) -> None:
    kind = rng.choice(list(GGML_QUANT_SIZES))
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_values = int(np.prod(tensor.dims))
    tensor.type, tensor.data = int(kind), bytes(n_values // block * block_bytes)


CHILD = """
import sys
import numpy as np
from pathlib import Path
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.errors import EdgeRuntimeError, ImageError
from edge_runtime.inputs.image import load_image
from edge_runtime.prompt.tokenizer import Tokenizer

for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    print(path.stem, end=" ", flush=True)
    try:
        decoder = Decoder(path, DecoderOptions())
        try:
            Tokenizer(decoder.file).encode("an apple")
            decoder.prefill(decoder.embed(np.array([0, 1, 2])))
            decoder.decode(3)
            assert decoder.logits().shape == (decoder.config.vocabulary,)
        finally:
            decoder.close()
        print("runs")
    except EdgeRuntimeError as error:
        print("llama.cpp" if "llama.cpp" in str(error) else "refused")
"""


def test_llama_cpp_never_ends_the_process(tmp_path: Path) -> None:
    """Each altered decoder either runs or is refused with our error; before the checks in `config`, 5 % aborted."""
    for seed in range(N_CASES):
        (tmp_path / f"{seed:04d}.gguf").write_bytes(altered_decoder(seed))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = child.stdout.splitlines()
    assert child.returncode == 0, f"{lines[-1:]} ended the process: {child.stderr[-2000:]}"
    outcomes = [line.split()[1] for line in lines]
    assert len(outcomes) == N_CASES
    for outcome in ("runs", "refused", "llama.cpp"):
        assert outcomes.count(outcome) > N_CASES // 20, f"too few cases test what they should: {outcome}"
