"""LoRA folders and adapters that cannot be followed: refused with a sentence, before anything is computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

import quantised_copies as q
from checkpoint_copies import CheckpointCopy, Stored, stored
from converters.test_lora import LAYER, VISION_PARTS, adapted, lora, named, pairs, plain
from edge_converters import convert_checkpoint
from edge_runtime import Model
from edge_runtime.errors import CheckpointError, ModelFileError
from edge_runtime.weights.gguf_file import GGUFFile

__all__ = ["adapted", "lora", "pairs", "plain"]


# --- refusals -------------------------------------------------------------------------------------------------


def good(copy: CheckpointCopy) -> q.Parts:
    return q.lora_tensors(q.random_lora(copy, [f"{LAYER}mlp.up_proj.weight"]))


A = f"{LAYER}mlp.up_proj.lora_A.weight"
TENSORS: dict[str, tuple[Callable[[q.Parts], Any], str]] = {
    "unknown module": (lambda t: t.update({"llm.extra.lora_A.weight": t[A]}), "llm.extra, which the checkpoint"),
    "unknown tensor": (lambda t: t.update({"llm.extra.weight": t[A]}), "llm.extra.weight, which the checkpoint"),
    "A alone": (lambda t: t.pop(A.replace("_A", "_B")), "lacks one of the two matrices"),
    "other inputs": (lambda t: t.update({A: stored(np.ones((4, 255)))}), r"has \(768, 256\); use the checkpoint"),
    "other rank": (lambda t: t.update({A: stored(np.ones((5, 256)))}), r"have shapes \(5, 256\) and \(768, 4\)"),
    "a vector": (lambda t: t.update({A: stored(np.ones(256))}), "lacks one of the two matrices"),
    "more tokens": (
        lambda t: t.update({"llm.model.embed_tokens.weight": stored(np.ones((690, 256)))}),
        r"has \(682, 256\); use the checkpoint",
    ),
    "integers": (lambda t: t.update({A: Stored("I32", (4, 256), bytes(4096))}), "as I32, expected F32"),
    "lengths without DoRA": (
        lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): stored(np.ones(768))}),
        "does not fit its use_dora",
    ),
    "nothing": (lambda t: t.clear(), "changes nothing"),
}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
    "alpha is text": ({"lora_alpha": "8"}, "'8' for lora_alpha"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "'nan' for lora_alpha"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out to True"),
    "biases of B": ({"lora_bias": True}, "lora_bias to True"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, r"'\(', which is no pattern"),
    "DoRA without lengths": ({"use_dora": True}, "does not fit its use_dora"),
}


def refuse(copy: CheckpointCopy, folder: Path, lora: Path, match: str, option: str = "lora") -> None:
    source = copy.write(folder / "source")
    with pytest.raises(CheckpointError, match=match) as caught:
        convert_checkpoint(source, folder / "out", **{option: lora})
    assert str(caught.value).endswith(".")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    change, match = TENSORS[name]
    tensors = good(copy)
    change(tensors)
    refuse(copy, tmp_path, q.write_lora(tmp_path / "lora", tensors), match)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_followed(copy: CheckpointCopy, tmp_path: Path, name: str) -> None:
    settings, match = SETTINGS[name]
    refuse(copy, tmp_path, q.write_lora(tmp_path / "lora", good(copy), **settings), match)


def test_folders_that_are_no_lora(copy: CheckpointCopy, tmp_path: Path) -> None:
    lora = q.write_lora(tmp_path / "lora", good(copy))
    refuse(copy, tmp_path, tmp_path / "nowhere", "has no adapter_config.json")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    refuse(copy, tmp_path, lora, "if it holds adapter_model.bin, save the LoRA again")
    (lora / "adapter_config.json").write_text("[")
    refuse(copy, tmp_path, lora, "is not readable JSON")


def test_what_no_adapter_can_hold(copy: CheckpointCopy, tmp_path: Path) -> None:
    embeddings = {"llm.model.embed_tokens.weight": stored(np.ones((682, 256)))}
    lora = q.write_lora(tmp_path / "whole", {**good(copy), **embeddings})
    refuse(copy, tmp_path, lora, "embed_tokens.weight by more than a product .* merge it with --lora", "lora_adapter")
    lora = q.write_lora(tmp_path / "vision", q.lora_tensors(q.random_lora(copy, VISION_PARTS)))
    refuse(copy, tmp_path, lora, "leaves the decoder as it is", "lora_adapter")
    lora = q.write_lora(tmp_path / "nothing", good(copy), lora_alpha=0)
    refuse(copy, tmp_path, lora, "alpha of 0", "lora_adapter")
    with pytest.raises(CheckpointError, match="give --lora or --lora-adapter"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", lora=lora, lora_adapter=lora)


def test_adapters_that_do_not_fit_are_refused_before_llama_cpp_sees_them(
    adapted: Path, exact_folder: Path, tmp_path: Path
) -> None:
    """The model of the package has other sizes; the decoder's own file is no adapter; a cut file is damaged."""
    adapter = adapted / "adapter-signs.gguf"
    with pytest.raises(ModelFileError, match=r"shape"):
        Model.load("demo", **named(adapter))
    with pytest.raises(ModelFileError, match=r"has general\.type"):
        Model.load(exact_folder, **named(exact_folder / "ggml-model-F32.gguf"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"cut\.gguf"):
        Model.load(exact_folder, **named(cut))
    with pytest.raises(ModelFileError, match=r"nowhere\.gguf"):
        Model.load(exact_folder, **named(tmp_path / "nowhere.gguf"))


@pytest.mark.parametrize("add", ["add_float64", "add_uint32", "add_string", None])
def test_an_alpha_of_another_type_is_refused(
    adapted: Path, exact_folder: Path, tmp_path: Path, add: str | None
) -> None:
    """llama.cpp would end the process."""
    source, path = GGUFFile(adapted / "adapter-signs.gguf"), tmp_path / "other.gguf"
    writer = GGUFWriter(path, "qwen3")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if add is not None:
        getattr(writer, add)("adapter.lora.alpha", "8" if add == "add_string" else 8)
    for name in source.tensors:
        writer.add_tensor(name, source.array(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match=r"adapter\.lora\.alpha"):
        Model.load(exact_folder, **named(path))


def test_changed_adapters_run_or_are_refused(adapted: Path, exact_folder: Path, tmp_path: Path) -> None:
    """Bytes altered, most of them of the header: a load or our error, never the end of the process."""
    data, rng, outcomes = (adapted / "adapter-signs.gguf").read_bytes(), random.Random(0), {"loaded": 0, "refused": 0}
    for number in range(150):
        altered = bytearray(data)
        for _ in range(rng.choice([1, 2, 4])):
            altered[rng.randrange(8, rng.choice([2600, len(data)]))] = rng.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(altered)
        try:
            Model.load(exact_folder, **named(path)).close()
            outcomes["loaded"] += 1
        except ModelFileError:
            outcomes["refused"] += 1
        path.unlink()
    assert min(outcomes.values()) > 5, outcomes
