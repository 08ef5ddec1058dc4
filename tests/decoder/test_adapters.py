"""LoRA adapters: equal to merged weights, apart from each other, and checked before llama.cpp sees them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from edge_runtime import MessageError, Model, ModelFileError
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.weights.gguf_file import GGUFFile
from support.command import refused
from support.gguf_maker import F32, F64, STRING, U32, Gguf
from support.lora_maker import RANK, make_adapter

QUESTIONS = ["What is it?", "Why?", "Say something.", "Who are you?"]


@pytest.fixture(scope="module")
def decoder_path(exact_folder: Path) -> Path:
    (path,) = (p for p in exact_folder.glob("*.gguf") if "mmproj" not in p.name)
    return path


@pytest.fixture(scope="module")
def adapters(decoder_path: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    paths = {name: folder / f"{name}.gguf" for name in ("one", "two")}
    for seed, path in enumerate(paths.values()):
        make_adapter(path, decoder_path, seed)
    return paths


def merged(decoder: Path, adapter: Path, target: Path, seed: int) -> Path:
    """The decoder with an adapter's products added to its own matrices."""
    shutil.copy(decoder, target)
    added = make_adapter(adapter, decoder, seed)
    for tensor in GGUFReader(target, "r+").tensors:
        if tensor.name in added:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            tensor.data[:] += added[tensor.name].reshape(tensor.data.shape)
    return target


def logits(path: Path, ids: list[int], adapters: dict[str, Path], name: str | None = None) -> np.ndarray:
    decoder = Decoder(path, DecoderOptions(n_ctx=128, exact=True, adapters=adapters))
    try:
        return decoder.logits(decoder.step([SequenceChunk(0, ids)], adapter=name)[0])
    finally:
        decoder.close()


def test_an_adapter_computes_what_merged_weights_do(decoder_path, tmp_path):
    ids, adapter = list(range(50, 90)), tmp_path / "a.gguf"
    whole = merged(decoder_path, adapter, tmp_path / "merged.gguf", seed=5)
    expected = logits(whole, ids, {})
    plain = logits(decoder_path, ids, {"a": adapter})
    np.testing.assert_allclose(logits(decoder_path, ids, {"a": adapter}, "a"), expected, atol=1e-3)
    np.testing.assert_allclose(plain, logits(decoder_path, ids, {}), atol=1e-6)
    assert abs(plain - expected).max() > 0.1, "this adapter changes too little to tell"


@pytest.fixture(scope="module")
def model(exact_folder: Path, adapters):
    with Model.load(exact_folder, exact=True, adapters=adapters) as loaded:
        yield loaded


def ask(model: Model, *content, **options):
    return model.chat([{"role": "user", "content": [*content]}], stream=True, greedy=True, max_tokens=12, **options)


def test_requests_with_different_adapters_run_side_by_side_and_apart(model, images, exact_folder, adapters):
    content = [(question,) for question in QUESTIONS] + [(images["tiny"], QUESTIONS[0])]
    requests = [(one, name) for one in content for name in (None, "one", "two")]
    together = [str(stream.result()) for stream in [ask(model, *one, adapter=name) for one, name in requests]]
    alone = []
    with Model.load(exact_folder, exact=True, adapters=adapters) as fresh:
        for one, name in requests:
            for sequence in range(fresh.engine.decoder.n_sequences):
                fresh.engine.run(lambda sequence=sequence: fresh.engine.decoder.rewind(sequence))
            alone.append(str(ask(fresh, *one, adapter=name).result()))
    assert together == alone
    assert len(set(together[:3])) == 3, "these adapters do not change the answer"


def test_nothing_computed_with_one_adapter_serves_another(model):
    question = "Tell me something long and new about adapters, please. " * 2
    first = ask(model, question, adapter="one").result()
    again = ask(model, question, adapter="one").result()
    other = ask(model, question, adapter="two").result()
    assert again.cached_tokens == again.prompt_tokens - 1
    assert str(again) == str(first)
    assert other.cached_tokens < 30  # the template's own beginning may be there from a test before


def test_adapters_are_kept_apart_on_disk(exact_folder, adapters, tmp_path):
    question = "Tell me something long and new about adapters, please. " * 3
    for name, known in ((None, False), ("one", False), ("two", False), ("one", True)):
        with Model.load(exact_folder, exact=True, adapters=adapters, cache_dir=tmp_path) as model:
            answer = ask(model, question, adapter=name).result()
            assert (answer.cached_tokens > 0) == known
    # It is the file that counts, not what it is called.
    with Model.load(exact_folder, exact=True, adapters={"uno": adapters["one"]}, cache_dir=tmp_path) as model:
        assert ask(model, question, adapter="uno").result().cached_tokens > 0


def test_an_adapter_that_was_not_loaded_is_named(model, demo):
    with pytest.raises(MessageError, match=r"adapter is 'three'; expected one of .*one, two"):
        ask(model, "Hello", adapter="three")
    with pytest.raises(MessageError, match=r"loaded with: none"):
        demo.chat("Hello", adapter="one")


def broken(path: Path, decoder: Path, change: str) -> Path:
    """An adapter that llama.cpp would refuse, misread or abort on."""
    n_out, n_in = GGUFFile(decoder).tensor("blk.0.attn_q.weight").shape
    file = Gguf()
    keys = {"general.architecture": "qwen3", "general.type": "adapter", "adapter.type": "lora"}
    for name, value in keys.items():
        file.key(name, STRING, value)
    file.key("adapter.lora.alpha", F32, 4.0)
    pair = {"a": (RANK, n_in), "b": (n_out, RANK)}
    name, kind = "blk.0.attn_q.weight", GGMLQuantizationType.F32
    if change in keys:
        file.key(change, STRING, "nonsense")
    elif change == "alpha of another type":
        file.key("adapter.lora.alpha", F64, 4.0)
    elif change == "alpha as text":
        file.key("adapter.lora.alpha", STRING, "4")
    elif change == "alpha zero":
        file.key("adapter.lora.alpha", F32, 0.0)
    elif change == "type as number":
        file.key("general.type", U32, 1)
    elif change == "alora":
        file.array("adapter.alora.invocation_tokens", U32, [1, 2])
    elif change == "one of a pair":
        del pair["b"]
    elif change == "shape of a":
        pair["a"] = (RANK, n_in * 2)
    elif change == "shape of b":
        pair["b"] = (n_out + 1, RANK)
    elif change == "ranks differ":
        pair["b"] = (n_out, RANK * 2)
    elif change == "transposed":
        pair["a"] = (n_in, RANK)
    elif change == "unknown matrix":
        name = "blk.77.attn_q.weight"
    elif change == "no matrix":
        name, pair = "output_norm.weight", {"a": (RANK, n_in), "b": (n_in, RANK)}
    elif change == "embeddings":
        name = "token_embd.weight"
    elif change == "odd type":
        kind = GGMLQuantizationType.F64
    elif change == "nothing":
        pair = {}
    for part, shape in pair.items():
        if kind == GGMLQuantizationType.F64:
            file.tensor(f"{name}.lora_{part}", shape)
            tensor = file.tensors[f"{name}.lora_{part}"]
            tensor.type, tensor.data = int(kind), tensor.data * 2
        else:
            file.tensor(f"{name}.lora_{part}", shape, kind)
    if change == "not finite":
        tensor = file.tensors[f"{name}.lora_a"]
        tensor.data = np.full(RANK * n_in, np.nan, np.float32).tobytes()
    if change == "extra tensor":
        file.tensor("blk.0.attn_norm.weight", (n_in,))
    raw = file.build()
    path.write_bytes(raw[: -n_out * RANK] if change == "cut short" else raw)
    return path


CHANGES = {
    "general.type": "general.type 'nonsense'",
    "general.architecture": "general.architecture 'nonsense'",
    "adapter.type": "adapter.type 'nonsense'",
    "type as number": "general.type holds a whole number",
    "alpha of another type": "adapter.lora.alpha is 4.0",
    "alpha as text": "adapter.lora.alpha holds text",
    "alpha zero": "adapter.lora.alpha is 0.0",
    "alora": "aLoRA",
    "one of a pair": "lora_b is missing",
    "shape of a": "lora_a has shape",
    "shape of b": "lora_b has shape",
    "ranks differ": "lora_b has shape",
    "transposed": "lora_a has shape",
    "unknown matrix": "blk.77.attn_q.weight.lora_a",
    "no matrix": "output_norm.weight.lora_a",
    "embeddings": "token embeddings",
    "odd type": "stored as F64",
    "nothing": "holds no tensors",
    "not finite": "not finite",
    "extra tensor": "'blk.0.attn_norm.weight'",
    "cut short": "cut short",
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.items())
def test_a_broken_adapter_is_refused_before_llama_cpp_sees_it(
    exact_folder, decoder_path, tmp_path, change, reason, monkeypatch
):
    path = broken(tmp_path / "lora.gguf", decoder_path, change)
    library = __import__("edge_runtime.decoder.llama_cpp", fromlist=["library"]).library()
    monkeypatch.setattr(library, "llama_adapter_lora_init", lambda *args: pytest.fail("llama.cpp saw it"))
    with pytest.raises(ModelFileError, match=reason):
        Model.load(exact_folder, exact=True, adapters={"x": path})


def test_the_maker_of_broken_adapters_makes_sound_ones(exact_folder, decoder_path, tmp_path):
    path = broken(tmp_path / "lora.gguf", decoder_path, "not at all")
    with Model.load(exact_folder, exact=True, adapters={"x": path}) as model:
        assert ask(model, "Hello", adapter="x").result().completion_tokens > 0


def test_the_command_line_takes_an_adapter(tmp_path, exact_folder):
    refused(["run", "Hi", "--lora", str(tmp_path / "none.gguf")], "does not exist")
    refused(["run", "Hi", "--lora", str(next(exact_folder.glob("mmproj*")))], "general.type")
