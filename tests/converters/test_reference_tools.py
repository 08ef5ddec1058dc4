"""Our files against those of other tools: llama.cpp's conversion scripts and quantizer, PEFT, bitsandbytes.

`make reference` brings them into build/reference: llama.cpp's scripts, which come with llama-cpp-python's source
distribution, an environment of their own with torch, and two of llama.cpp's tools. EDGE_RUNTIME_REFERENCE names
another folder; where it is set, as in CI, these tests never skip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from checkpoint_copies import CheckpointCopy, read_shard
from edge_converters import convert_checkpoint
from edge_converters.calibration.importance import read_importance
from edge_converters.calibration.importance_from_pictures import Observer
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime import Model
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.vision.sine_positions import frequencies
from edge_runtime.weights.gguf_file import GGUFFile
from naive import random_tensors, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parents[1] / "reference_tools"
REFERENCE = Path(os.environ.get("EDGE_RUNTIME_REFERENCE", ROOT / "build" / "reference")).absolute()
LLAMA_CPP = REFERENCE / "llama.cpp"
VISION_SCRIPT = LLAMA_CPP / "tools" / "mtmd" / "legacy-models" / "minicpmv-convert-image-encoder-to-gguf.py"
LOGITS = 1e-3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "EDGE_RUNTIME_REFERENCE" not in os.environ and not (REFERENCE / "ready").exists(),
        reason="llama.cpp's scripts are not here; 'make reference' brings them",
    ),
]

# Keys of our files that differ from those of the scripts, with the reason.
DECODER_EXCEPTIONS = {
    "general.name": "the checkpoint's, where the script takes the folder's it is started on",
    "general.size_label": "a description that the script makes of the number of parameters",
    "general.sampling.temp": "from generation_config.json, which the official chat() does not use",
    "general.sampling.top_k": "likewise",
    "general.sampling.top_p": "likewise",
    "tokenizer.ggml.add_bos_token": "false in all our files; the script writes it if the tokenizer's files do",
    "tokenizer.ggml.add_eos_token": "false by default; the script writes it if the tokenizer's files do",
    "tokenizer.ggml.token_type": "special is what the tokenizer says is; the script guesses by the look",
    "tokenizer.chat_template": "the official one where the checkpoint brings none; without it nobody can chat",
    "edge_runtime.tokenizer.normalizer": "ours",
    "edge_runtime.toy": "ours",
}
VISION_EXCEPTIONS = {
    "general.name": "the script writes none",
    "general.type": "the script writes none",
    "edge_runtime.max_slice_nums": "ours",
    "edge_runtime.use_image_id": "ours",
}
# The table that llama.cpp loads and never reads: the script's bytes depend on the processor, through NumPy's power.
POSITIONS, POSITIONS_ERROR = "resampler.pos_embed_k", 2e-7
FLOAT32_STEP = 2.0**-23  # relative, of the last bit


def run(*command: Any, cwd: Path | None = None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(LLAMA_CPP / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def python(script: str | Path, *arguments: Any) -> None:
    """Run a script in the reference environment."""
    run(REFERENCE / "venv" / "bin" / "python", SCRIPTS / script, *arguments)


def tool(name: str, *arguments: Any, cwd: Path) -> None:
    """Run one of llama.cpp's tools."""
    run(REFERENCE / "bin" / name, *arguments, cwd=cwd)


class Parts(NamedTuple):
    """A checkpoint, and what llama.cpp's scripts take."""

    checkpoint: Path
    folder: Path

    def decoder(self, kind: str) -> Path:
        """The script's decoder file."""
        path = self.folder / f"decoder-{kind}.gguf"
        if not path.exists():
            arguments = (LLAMA_CPP, self.folder / "decoder", "--outfile", path, "--outtype", kind)
            python("convert_decoder.py", *arguments)
        return path

    def vision(self) -> Path:
        """The script's mmproj file, in float16."""
        projector = self.folder / "minicpmv.projector"
        arguments = ("-m", self.folder, "--minicpmv-projector", projector, "--minicpmv_version", 6)
        python(VISION_SCRIPT, *arguments, "--output-dir", self.folder / "vision")
        return self.folder / "vision" / "mmproj-model-f16.gguf"


@pytest.fixture(scope="module", params=["tiny", "demo"])
def parts(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The tiny checkpoint (bfloat16, shards, vocab.json), and one like the demo's (float32, tokenizer.json alone)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        checkpoint = folder / "checkpoint"
        shutil.copytree(ROOT / "demo" / "skeleton", checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        write_safetensors(checkpoint / "model.safetensors", random_tensors(config, 5))
    python("save_parts.py", checkpoint, folder / "parts")
    return Parts(checkpoint, folder / "parts")


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def compare(ours: Path, theirs: Path, exceptions: dict[str, str]) -> None:
    """Every key but the exceptions, and every tensor: type, shape and bytes."""
    one, other = GGUFFile(ours), GGUFFile(theirs)
    keys = [key for key in {**one.metadata, **other.metadata} if key not in exceptions]
    assert len(keys) > 15
    differing = {k: (one.metadata.get(k), other.metadata.get(k)) for k in keys}
    assert {k: v for k, v in differing.items() if plain(v[0]) != plain(v[1])} == {}
    compare_tensors(one, other)


def compare_tensors(one: GGUFFile, other: GGUFFile) -> None:
    assert set(one.tensors) == set(other.tensors)
    for name, info in one.tensors.items():
        assert (info.shape, info.type) == (other.tensors[name].shape, other.tensors[name].type), name
        if name == POSITIONS:
            compare_positions(one.array(name), other.array(name))
        else:
            np.testing.assert_array_equal(one.blocks(name), other.blocks(name), err_msg=name)


def compare_positions(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Sine tables of [positions, width]; where NumPy's power gives another frequency here, that one bit may show.

    Ours are made with the frequencies that NumPy has on AVX-512 machines (`edge_runtime.vision.sine_positions`). A
    last bit of a frequency grows with the position, and the phase is then rounded to another float32: by these two
    steps, and not more, may a column of such a frequency differ.
    """
    side, n = round(len(ours) ** 0.5), ours.shape[1] // 4
    numpys = (1.0 / 10000 ** (np.arange(n, dtype=np.float32) / np.float32(n))).astype(np.float32)
    differs = np.where(numpys == frequencies(n), 0.0, 2 * FLOAT32_STEP)
    row, column = (grid.reshape(-1, 1) for grid in np.indices((side, side)))
    bound = np.hstack([np.tile(position * (frequencies(n) * differs), 2) for position in (column, row)])
    assert (np.abs(ours.astype(np.float64) - theirs) <= POSITIONS_ERROR + bound).all()


# --- llama.cpp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_decoder_files_equal_those_of_the_conversion_script(parts: Parts, tmp_path: Path, kind: str) -> None:
    files = convert_checkpoint(parts.checkpoint, tmp_path, decoder_type=kind)
    compare(files.decoder, parts.decoder(kind), DECODER_EXCEPTIONS)


def test_the_script_calls_more_tokens_special_and_none_fewer(parts: Parts, tmp_path: Path) -> None:
    """The exception in its extent: tokens that look like markup and that the tokenizer says are not special."""
    files = convert_checkpoint(parts.checkpoint, tmp_path, decoder_type="f16")
    ours, theirs = (GGUFFile(path) for path in (files.decoder, parts.decoder("f16")))
    types = [file.metadata["tokenizer.ggml.token_type"] for file in (ours, theirs)]
    rows = np.flatnonzero(types[0] != types[1])
    assert {(int(types[0][row]), int(types[1][row])) for row in rows} <= {(4, 3)}
    tokens = ours.strings("tokenizer.ggml.tokens")
    assert all(tokens[row].startswith("<|") and tokens[row].endswith("|>") for row in rows)


def test_vision_files_equal_those_of_the_conversion_script(parts: Parts, tmp_path: Path) -> None:
    files = convert_checkpoint(parts.checkpoint, tmp_path, decoder_type="f16", vision_type="f16")
    compare(files.mmproj, parts.vision(), VISION_EXCEPTIONS)


@pytest.mark.parametrize("kind", ["q4_k_m", "q4_k_s", "q5_k_m", "iq4_nl"])
def test_quantised_files_equal_those_of_script_and_llama_quantize(parts: Parts, tmp_path: Path, kind: str) -> None:
    """From their float32 file by their quantizer; ours may have gone over bfloat16."""
    ours = convert_checkpoint(parts.checkpoint, tmp_path, decoder_type=kind).decoder
    theirs = tmp_path / "theirs.gguf"
    tool("llama-quantize", parts.decoder("f32"), theirs, kind.upper(), cwd=tmp_path)
    compare(ours, theirs, DECODER_EXCEPTIONS)


def test_tensor_types_are_applied_as_by_llama_quantize(parts: Parts, tmp_path: Path) -> None:
    patterns = ["attn_v=q6_k", r"blk\.1\.ffn=q5_k", "token_embd=q8_0", "output.weight=q5_0"]
    files = convert_checkpoint(parts.checkpoint, tmp_path, tensor_types=patterns)
    theirs = tmp_path / "theirs.gguf"
    options = [part for pattern in patterns for part in ("--tensor-type", pattern)]
    tool("llama-quantize", *options, parts.decoder("f32"), theirs, "Q4_K_M", cwd=tmp_path)
    compare(files.decoder, theirs, DECODER_EXCEPTIONS)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_importance_matrices_are_used_as_by_llama_quantize(parts: Parts, tmp_path: Path, form: str) -> None:
    """Made by llama-imatrix in both formats; files equal byte for byte, the keys about the matrix included."""
    plain_file = convert_checkpoint(parts.checkpoint, tmp_path / "f32", decoder_type="f32").decoder
    (tmp_path / "text.txt").write_text("the quick brown fox 123 " * 60)
    name = f"importance.{form}"
    options = ("-m", plain_file, "-f", "text.txt", "-o", name, "--output-format", form, "-c", 64, "-b", 64, "-t", 1)
    tool("llama-imatrix", *options, "--no-ppl", "-ngl", 0, cwd=tmp_path)
    assert len(read_importance(tmp_path / name).squares) > 20
    tool("llama-quantize", "--imatrix", name, plain_file, "theirs.gguf", "Q4_K_M", cwd=tmp_path)
    ours = convert_checkpoint(parts.checkpoint, tmp_path / "ours", imatrix=tmp_path / name).decoder
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    without = convert_checkpoint(parts.checkpoint, tmp_path / "without").decoder
    assert ours.read_bytes() != without.read_bytes()


def test_our_importance_matrix_equals_that_of_llama_imatrix(parts: Parts, tmp_path: Path) -> None:
    """Over one text that fills its chunks, cut as there: 96 tokens with a memory of their own."""
    files = convert_checkpoint(parts.checkpoint, tmp_path / "f32", decoder_type="f32", vision_type="f32")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox 123 " * 60)
    options = (
        "-m",
        files.decoder,
        "-f",
        text,
        "-o",
        tmp_path / "theirs.gguf",
        "-c",
        96,
        "-b",
        96,
        "-ub",
        96,
        "-t",
        1,
    )
    tool("llama-imatrix", *options, "--no-ppl", "-ngl", 0, cwd=tmp_path)
    file = GGUFFile(files.decoder)
    ids = Tokenizer(file).encode(text.read_text())
    with Observer(files.decoder) as observer:
        for start in range(0, len(ids) - 95, 96):
            observer.feed(file.rows("token_embd.weight", np.asarray(ids[start : start + 96])))
        ours = observer.means()
    theirs = read_importance(tmp_path / "theirs.gguf").squares
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-3, atol=1e-5 * expected.mean(), err_msg=name)


# --- PEFT -----------------------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": [*PROJECTIONS, "lm_head"]},
    "stabilised, with patterns": {
        "r": 8,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 11, "down_proj": 2},
        "target_modules": PROJECTIONS,
    },
    "DoRA": {"r": 4, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    "trained whole": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def our_logits(folder: Path, lora: Path | None = None) -> np.ndarray:
    adapters = {} if lora is None else {"signs": lora}
    with Model.load(folder, exact=True, adapters=adapters) as model:
        embeddings = model.engine.decoder.embed(np.arange(3, 60, 2))
        model.engine.run(lambda: model.engine.decoder.prefill(embeddings, lora and "signs"))
        return model.engine.run(model.engine.decoder.logits)


@pytest.fixture(scope="module")
def peft(parts: Parts) -> Callable[[str], tuple[Path, np.ndarray]]:
    """Name to a LoRA folder that PEFT wrote, and PyTorch's logits with it."""
    folder = parts.folder / "loras"
    python("peft_logits.py", parts.folder / "decoder", folder, json.dumps(list(LORAS.values())))
    paths = {name: folder / f"lora-{i}" for i, name in enumerate(LORAS)}
    return lambda name: (paths[name], np.load(paths[name].with_suffix(".npy")))


@pytest.mark.parametrize("name", LORAS)
def test_merged_logits_equal_those_of_peft(
    parts: Parts, peft: Callable[[str], tuple[Path, np.ndarray]], tmp_path: Path, name: str
) -> None:
    lora, expected = peft(name)
    convert_checkpoint(parts.checkpoint, tmp_path / "base", decoder_type="f32", vision_type="f32")
    convert_checkpoint(parts.checkpoint, tmp_path / "merged", decoder_type="f32", vision_type="f32", lora=lora)
    np.testing.assert_allclose(our_logits(tmp_path / "merged"), expected, rtol=0, atol=LOGITS)
    assert np.abs(our_logits(tmp_path / "base") - expected).max() > 100 * LOGITS


@pytest.mark.parametrize("name", list(LORAS)[:2])
def test_adapter_logits_equal_those_of_peft(
    parts: Parts, peft: Callable[[str], tuple[Path, np.ndarray]], tmp_path: Path, name: str
) -> None:
    lora, expected = peft(name)
    files = convert_checkpoint(parts.checkpoint, tmp_path, decoder_type="f32", vision_type="f32", lora_adapter=lora)
    np.testing.assert_allclose(our_logits(tmp_path, lora=files.adapter), expected, rtol=0, atol=LOGITS)


def test_adapters_equal_those_of_the_conversion_script(
    parts: Parts, peft: Callable[[str], tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    lora, _ = peft("plain")
    files = convert_checkpoint(parts.checkpoint, tmp_path, lora_adapter=lora)
    theirs = tmp_path / "theirs.gguf"
    script, base = LLAMA_CPP / "convert_lora_to_gguf.py", parts.folder / "decoder"
    python(script, lora, "--base", base, "--outfile", theirs, "--outtype", "f32")
    assert files.adapter is not None
    one, other = GGUFFile(files.adapter), GGUFFile(theirs)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert one.metadata[key] == other.metadata[key]
    compare_tensors(one, other)


# --- bitsandbytes ---------------------------------------------------------------------------------------------


def test_values_equal_those_of_bitsandbytes(copy: CheckpointCopy, tmp_path: Path) -> None:
    """NF4 and FP4, with and without double quantisation, stored and read by the library itself."""
    python("bitsandbytes_parts.py", tmp_path / "parts.safetensors", tmp_path / "values.npz")
    copy.tensors |= read_shard(tmp_path / "parts.safetensors")
    tensors = Checkpoint(copy.write(tmp_path / "source")).tensors
    with np.load(tmp_path / "values.npz") as values:
        assert len(values) == 12
        for name, expected in values.items():
            found = tensors[name].float_rows(0, tensors[name].n_rows)
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9, err_msg=name)
