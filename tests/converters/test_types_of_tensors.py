"""`--tensor-type`, `--report` and `info --source`: types of single tensors, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_converters import convert_checkpoint
from edge_converters.convert import Converted
from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.errors import CheckpointError
from edge_runtime.weights.gguf_file import GGUFFile


@pytest.mark.parametrize("decoder_type", ["q4_k_m", "q8_0", "f16"])
def test_decoder_tensors_get_their_types(checkpoint: Path, tmp_path: Path, decoder_type: str) -> None:
    """In mixes, which llama.cpp makes, and in plain types, which we make; the first pattern that matches counts."""
    patterns = [r"blk\.0\..*_down=q5_k", "ffn_down=q6_k", "^output=Q5_0", "attn_k.weight=bf16"]
    files = convert_checkpoint(checkpoint, tmp_path, decoder_type=decoder_type, tensor_types=patterns)
    types = {name: info.type.name for name, info in GGUFFile(files.decoder).tensors.items()}
    assert [types[f"blk.{n}.ffn_down.weight"] for n in range(3)] == ["Q5_K", "Q6_K", "Q6_K"]
    assert types["output.weight"] == "Q5_0"
    assert {types[f"blk.{n}.attn_k.weight"] for n in range(3)} == {"BF16"}
    assert types["output_norm.weight"] == types["blk.0.attn_k_norm.weight"] == "F32"
    usual = {"q4_k_m": "Q4_K", "q8_0": "Q8_0", "f16": "F16"}[decoder_type]
    assert types["blk.1.ffn_up.weight"] == types["token_embd.weight"] == usual
    with Model.load(tmp_path) as model:
        assert model.chat("Hello", greedy=True, max_tokens=4).completion_tokens > 0


@pytest.mark.parametrize("kind", ["iq4_xs", "q3_k_m", "iq3_m"])
def test_small_types_are_read_answered_and_named(
    converted: Callable[[str, str], Converted], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our kernels, which leave the products that they do not know to llama.cpp, answers are llama.cpp's."""
    files, found = converted(kind, "q8_0"), {}
    for setting in ("off", "on"):
        monkeypatch.setenv("EDGE_RUNTIME_KERNELS", setting)
        with Model.load(files.decoder.parent) as model:
            assert model.engine.decoder.uses_kernels == (setting == "on")
            found[setting] = model.trace("What is it?", 0).logits
            assert model.chat("Hello", greedy=True, max_tokens=4).completion_tokens > 0
    assert np.corrcoef(found["off"], found["on"])[0, 1] > 0.999
    shown = CliRunner().invoke(main, ["info", str(files.decoder)]).stdout
    (types,) = (line for line in shown.splitlines() if line.startswith("decoder types"))
    assert {"iq4_xs": "IQ4_XS", "q3_k_m": "Q3_K", "iq3_m": "IQ3_S"}[kind] in types
    assert GGUFFile(files.decoder).get("general.file_type", int) == {"iq4_xs": 30, "q3_k_m": 12, "iq3_m": 27}[kind]


@pytest.mark.parametrize(("kind", "is_told"), [("iq3_m", True), ("q3_k_m", True), ("iq4_xs", False)])
def test_types_of_few_bits_ask_for_an_importance_matrix(checkpoint: Path, tmp_path: Path, kind: str, is_told: bool):
    notes = convert_checkpoint(checkpoint, tmp_path, decoder_type=kind).notes
    assert any("without an importance matrix" in note and "--calibrate" in note for note in notes) == is_told


def test_vision_tensors_get_their_types(checkpoint: Path, tmp_path: Path, images: dict[str, Path]) -> None:
    patterns = ["resampler=f16", r"v\.blk\.1\.attn_q=f32", "position_embd=q8_0", "patch_embd=f32"]
    files = convert_checkpoint(checkpoint, tmp_path, vision_type="q4_0", vision_tensor_types=patterns)
    types = {name: info.type.name for name, info in GGUFFile(files.mmproj).tensors.items()}
    assert {types[name] for name in types if name.startswith("resampler.attn") and name.endswith("weight")} == {"F16"}
    assert (types["v.blk.1.attn_q.weight"], types["v.blk.0.attn_q.weight"]) == ("F32", "Q4_0")
    assert (types["v.position_embd.weight"], types["v.patch_embd.weight"]) == ("Q8_0", "F32")
    assert types["resampler.query"] == types["v.blk.1.attn_q.bias"] == "F32"
    with Model.load(tmp_path) as model:
        assert len(model.encode_image(images["square"])) == 1


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        (["attn_q"], "is 'attn_q'; expected PATTERN=TYPE"),
        (["=q8_0"], "is '=q8_0'; expected PATTERN=TYPE"),
        (["attn_q=q9"], "expected PATTERN=TYPE with one of f32, f16"),
        (["attn_(=q8_0"], "holds no regular expression"),
        (["attn_z=q8_0"], "matches no matrix of the file; names are such as blk"),
        (["attn_q_norm=q8_0"], "matches no matrix"),
    ],
)
def test_patterns_that_say_nothing(checkpoint: Path, tmp_path: Path, patterns: list[str], match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(checkpoint, tmp_path / "out", tensor_types=patterns)
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("attn_q=q4_k", "expected PATTERN=TYPE with one of f32, f16, bf16, q8_0, q4_0"),
        ("ffn_up=q8_0", "have 304 values, which Q8_0 cannot hold in blocks of 32"),
        ("patch_embd=bf16", "convolution kernel, which can be f32 or f16 alone"),
        ("blk.0.ffn_gate=f16", "matches no matrix"),
    ],
)
def test_vision_patterns_that_do_not_fit(checkpoint: Path, tmp_path: Path, pattern: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        convert_checkpoint(checkpoint, tmp_path / "out", vision_tensor_types=[pattern])


def test_a_report_tells_errors_sizes_and_bits(checkpoint: Path, tmp_path: Path) -> None:
    """Against all values; a spread of rows of large tensors comes close to that."""
    files = convert_checkpoint(checkpoint, tmp_path / "q4", report=True)
    exact = convert_checkpoint(checkpoint, tmp_path / "f32", decoder_type="f32", vision_type="f32")
    for found, path, plain in zip(
        files.reports, (files.decoder, files.mmproj), (exact.decoder, exact.mmproj), strict=True
    ):
        file, reference = GGUFFile(path), GGUFFile(plain)
        assert (found.name, found.n_bytes) == (path.name, path.stat().st_size)
        assert {tensor.name for tensor in found.tensors} == set(file.tensors)
        n_bytes = sum(info.n_bytes for info in file.tensors.values())
        n_values = sum(info.n_elements for info in file.tensors.values())
        assert found.bits_per_weight == pytest.approx(8 * n_bytes / n_values)
        for tensor in found.tensors:
            values, expected = file.array(tensor.name), reference.array(tensor.name)
            error = np.sqrt(np.mean((values - expected) ** 2) / np.mean(expected**2))
            assert tensor.error == pytest.approx(error, rel=0.1, abs=1e-9), tensor.name
            assert tensor.type == file.tensors[tensor.name].type.name
    assert 4.5 < files.reports[0].bits_per_weight < 7
    assert 0.05 < files.reports[0].error < 0.08


def test_reports_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    """Printed by `convert --report`, and by `info --source` for a file made before; then as JSON, too."""
    runner, out = CliRunner(), tmp_path / "out"
    done = runner.invoke(main, ["convert", str(checkpoint), "-o", str(out), "--report"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ggml-model-Q4_K_M.gguf: ")
    assert lines[0].endswith("bits per weight")
    assert any(line.split()[:2] == ["blk.0.attn_q.weight", "Q4_K"] and line.endswith("%") for line in lines)
    again = runner.invoke(main, ["info", str(out / "ggml-model-Q4_K_M.gguf"), "--source", str(checkpoint)])
    assert again.exit_code == 0, again.output
    assert again.stdout.splitlines() == lines[: len(again.stdout.splitlines())]
    mmproj = ["info", str(out / "mmproj-model-q8_0.gguf"), "--source", str(checkpoint), "--json"]
    found = json.loads(runner.invoke(main, mmproj).stdout)
    assert 0.002 < found["error"] < 0.01
    assert {"name", "shape", "type", "n_bytes", "error"} == set(found["tensors"][0])
    usage = runner.invoke(main, ["info", "--source", str(checkpoint)])
    assert (usage.exit_code, "needs a .gguf file" in usage.stderr) == (2, True)
    other = runner.invoke(main, ["info", str(out / "nowhere.gguf"), "--source", str(checkpoint)])
    assert (other.exit_code, other.stderr.count("\n")) == (1, 1)


def test_a_report_needs_the_right_source(
    checkpoint: Path, converted: Callable[[str, str], Converted], exact_folder: Path
) -> None:
    demo = Path(__file__).resolve().parents[2] / "edge_runtime" / "demo" / "ggml-model-Q4_K_M.gguf"
    result = CliRunner().invoke(main, ["info", str(demo), "--source", str(checkpoint)])
    assert result.exit_code == 1
    assert "of another shape; name the checkpoint that the file was made from." in result.stderr
