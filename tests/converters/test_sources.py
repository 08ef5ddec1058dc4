"""The forms a checkpoint may have: shards, dtypes, tokenizer files, optional settings. Same model, same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType

from checkpoint_copies import CheckpointCopy, Stored, stored
from edge_converters import convert_checkpoint
from edge_runtime import Model
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.weights.gguf_file import GGUFFile

EMBEDDING, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
TEXT = "Hello, wörld! 123 <unk> the then\n\n  e\u0301"


def as_dtype(copy: CheckpointCopy, dtype: str) -> CheckpointCopy:
    """The copy with every tensor as `dtype`, of values that all three dtypes hold exactly."""

    def change(tensor: Stored) -> Stored:
        return stored(tensor.values.astype(np.float16).astype(np.float32), dtype)

    return CheckpointCopy(copy.files, {name: change(tensor) for name, tensor in copy.tensors.items()})


def files_of(folder: Path, out: Path, **types: str) -> list[bytes]:
    files = convert_checkpoint(folder, out, **types)
    return [files.decoder.read_bytes(), files.mmproj.read_bytes()]


def decoder_of(copy: CheckpointCopy, folder: Path) -> GGUFFile:
    source = copy.write(folder / "source")
    return GGUFFile(convert_checkpoint(source, folder / "out", decoder_type="f32", vision_type="f32").decoder)


@pytest.mark.parametrize("n_shards", [1, 2, 7])
@pytest.mark.parametrize("with_index", [True, False])
def test_shards_change_nothing(
    copy: CheckpointCopy, checkpoint: Path, tmp_path: Path, n_shards: int, with_index: bool
) -> None:
    source = copy.write(tmp_path / "source", n_shards, with_index=with_index)
    types = {"decoder_type": "bf16", "vision_type": "f16"}
    assert files_of(source, tmp_path / "a", **types) == files_of(checkpoint, tmp_path / "b", **types)


@pytest.mark.parametrize(
    ("decoder_type", "vision_type"), [("f32", "f32"), ("bf16", "f16"), ("f16", "q8_0"), ("q4_k_m", "q8_0")]
)
def test_stored_dtypes_change_nothing(
    copy: CheckpointCopy, tmp_path: Path, decoder_type: str, vision_type: str
) -> None:
    types = {"decoder_type": decoder_type, "vision_type": vision_type}
    written = [
        files_of(as_dtype(copy, dtype).write(tmp_path / dtype), tmp_path / f"{dtype}-out", **types)
        for dtype in ("F32", "F16", "BF16")
    ]
    assert written[0] == written[1] == written[2]


def test_mixed_dtypes_lose_nothing_on_the_way_to_blocks(copy: CheckpointCopy, tmp_path: Path) -> None:
    """A float32 head beside bfloat16 matrices is quantized from its float32 values."""
    third = np.float32(1 / 3)  # fits neither float16 nor bfloat16
    copy.tensors[HEAD] = stored(copy.tensors[HEAD].values * third)
    mixed = files_of(copy.write(tmp_path / "mixed"), tmp_path / "mixed-out")
    for name, tensor in copy.tensors.items():
        copy.tensors[name] = stored(tensor.values)
    assert files_of(copy.write(tmp_path / "f32"), tmp_path / "f32-out") == mixed


def tokenizer_keys(file: GGUFFile) -> dict[str, Any]:
    keys = (key for key in file.metadata if key.startswith("tokenizer."))
    return {k: np.asarray(file.metadata[k]).tolist() for k in keys}


def test_tokenizer_json_alone_is_the_same_tokenizer(copy: CheckpointCopy, exact_folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        del copy.files[name]
    file = decoder_of(copy, tmp_path)
    usual = GGUFFile(exact_folder / "ggml-model-F32.gguf")
    assert tokenizer_keys(file) == tokenizer_keys(usual)
    assert Tokenizer(file).encode(TEXT) == Tokenizer(usual).encode(TEXT)


def test_vocab_and_merges_without_tokenizer_json(copy: CheckpointCopy, exact_folder: Path, tmp_path: Path) -> None:
    del copy.files["tokenizer.json"]
    assert tokenizer_keys(decoder_of(copy, tmp_path)) == tokenizer_keys(
        GGUFFile(exact_folder / "ggml-model-F32.gguf")
    )


def test_merges_may_be_pairs_or_strings(copy: CheckpointCopy, exact_folder: Path, tmp_path: Path) -> None:
    del copy.files["vocab.json"]
    model = copy.files["tokenizer.json"]["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    strings = decoder_of(copy, tmp_path / "strings")
    model["merges"] = [merge.split(" ") for merge in model["merges"]]
    pairs = decoder_of(copy, tmp_path / "pairs")
    expected = tokenizer_keys(GGUFFile(exact_folder / "ggml-model-F32.gguf"))
    assert tokenizer_keys(strings) == tokenizer_keys(pairs) == expected


def test_a_tokenizer_without_nfc_is_marked_so(copy: CheckpointCopy, tmp_path: Path) -> None:
    del copy.files["vocab.json"]
    copy.files["tokenizer.json"]["normalizer"] = None
    file = decoder_of(copy, tmp_path)
    assert file.metadata["edge_runtime.tokenizer.normalizer"] == "none"
    assert Tokenizer(file).encode("e\u0301") != Tokenizer(file).encode("\u00e9")


def test_token_types(copy: CheckpointCopy, exact_folder: Path) -> None:
    """Special tokens are control tokens, other added ones user-defined; `<unk>` of the base vocabulary is special."""
    tokenizer = Tokenizer(GGUFFile(exact_folder / "ggml-model-F32.gguf"))
    added = copy.files["tokenizer_config.json"]["added_tokens_decoder"]
    for row, text in enumerate(tokenizer.tokens):
        token = added.get(str(row))
        expected = (
            TokenType.NORMAL if token is None else TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        )
        assert (tokenizer.types[row], text) == (expected, token["content"] if token else text)
    assert tokenizer.types[tokenizer.ids["<unk>"]] == TokenType.CONTROL
    assert tokenizer.types[tokenizer.ids["<think>"]] == TokenType.USER_DEFINED


def test_a_chat_template_file_wins(copy: CheckpointCopy, tmp_path: Path) -> None:
    copy.files["chat_template.jinja"] = b"{{ messages[0].content }} \xc3\xa9"
    assert decoder_of(copy, tmp_path).metadata["tokenizer.chat_template"] == "{{ messages[0].content }} é"


def test_named_chat_templates(copy: CheckpointCopy, tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    copy.files["tokenizer_config.json"]["chat_template"] = templates
    assert decoder_of(copy, tmp_path).metadata["tokenizer.chat_template"] == "D"


def test_without_a_chat_template_the_official_one_is_written(copy: CheckpointCopy, tmp_path: Path) -> None:
    del copy.files["tokenizer_config.json"]["chat_template"]
    assert decoder_of(copy, tmp_path).metadata["tokenizer.chat_template"] == OFFICIAL_CHAT_TEMPLATE


def test_rows_without_a_token_get_distinct_names(copy: CheckpointCopy, tmp_path: Path) -> None:
    """llama.cpp aborts the process on duplicates; a real token may be called like a filler."""
    n_rows = copy.config["vocab_size"]
    for name in (EMBEDDING, HEAD):
        old = copy.tensors[name]
        copy.tensors[name] = Stored(old.dtype, (n_rows + 3, old.shape[1]), old.raw + old.raw[: 3 * 2 * old.shape[1]])
    copy.config["vocab_size"] = n_rows + 3
    taken = f"[PAD{n_rows + 1}]"
    copy.files["vocab.json"][taken] = copy.files["vocab.json"].pop("!")
    file = decoder_of(copy, tmp_path)
    tokens = file.strings("tokenizer.ggml.tokens")
    assert tokens[n_rows:] == [f"[PAD{n_rows}]", f"[{taken}]", f"[PAD{n_rows + 2}]"]
    assert file.metadata["tokenizer.ggml.token_type"][n_rows:].tolist() == [TokenType.UNUSED] * 3
    with Model.load(tmp_path / "out") as model:
        assert len(model.trace("Hello", 0).logits) == n_rows + 3


def test_dropping_the_last_vision_layer(copy: CheckpointCopy, tmp_path: Path) -> None:
    """An absent key means true, as in the official configuration class."""
    full = convert_checkpoint(copy.write(tmp_path / "kept"), tmp_path / "out", vision_type="f32")
    copy.config["drop_vision_last_layer"] = True
    dropped = files_of(copy.write(tmp_path / "dropped"), tmp_path / "dropped-out", vision_type="f32")
    del copy.config["drop_vision_last_layer"]
    assert files_of(copy.write(tmp_path / "absent"), tmp_path / "absent-out", vision_type="f32") == dropped
    smaller = GGUFFile(tmp_path / "dropped-out" / full.mmproj.name)
    missing = set(GGUFFile(full.mmproj).tensors) - set(smaller.tensors)
    assert missing == {name for name in GGUFFile(full.mmproj).tensors if name.startswith("v.blk.2.")}
    assert smaller.metadata["clip.vision.block_count"] == 2
    for name in [name for name in copy.tensors if name.startswith("vpm.encoder.layers.2.")]:
        del copy.tensors[name]  # an exporter may leave the unused layer out
    assert files_of(copy.write(tmp_path / "gone"), tmp_path / "gone-out", vision_type="f32") == dropped


def test_tied_embeddings(copy: CheckpointCopy, tmp_path: Path) -> None:
    """Without a head of its own, llama.cpp uses the embedding table; the logits are those of a copied head."""
    copy.tensors[HEAD] = copy.tensors[EMBEDDING]
    decoder_of(copy, tmp_path / "copied")
    copy.config["tie_word_embeddings"] = True
    del copy.tensors[HEAD]
    assert "output.weight" not in decoder_of(copy, tmp_path / "tied").tensors
    logits = []
    for name in ("copied", "tied"):
        with Model.load(tmp_path / name / "out", exact=True) as model:
            logits.append(model.trace("Hello", 0).logits)
    np.testing.assert_array_equal(*logits)


def test_head_width_defaults_to_hidden_over_heads(copy: CheckpointCopy, tmp_path: Path) -> None:
    expected = files_of(copy.write(tmp_path / "given"), tmp_path / "given-out")
    assert copy.config["head_dim"] == copy.config["hidden_size"] // copy.config["num_attention_heads"]
    del copy.config["head_dim"]
    assert files_of(copy.write(tmp_path / "absent"), tmp_path / "absent-out") == expected


def test_slicing_settings_come_from_the_checkpoint(copy: CheckpointCopy, tmp_path: Path) -> None:
    """preprocessor_config.json first, then slice_config, then the official defaults."""
    preprocessor = copy.files["preprocessor_config.json"]
    preprocessor |= {"max_slice_nums": 4, "scale_resolution": 224, "use_image_id": False, "norm_std": [0.25, 0.5, 1]}
    copy.config["slice_config"] |= {"max_slice_nums": 7, "scale_resolution": 336}

    def settings(name: str) -> list[Any]:
        files = convert_checkpoint(copy.write(tmp_path / name), tmp_path / f"{name}-out")
        metadata = GGUFFile(files.mmproj).metadata
        keys = ("edge_runtime.max_slice_nums", "edge_runtime.use_image_id", "clip.vision.image_size")
        return [metadata[key] for key in keys] + metadata["clip.vision.image_std"].tolist()

    assert settings("preprocessor") == [4, False, 224, 0.25, 0.5, 1]
    del copy.files["preprocessor_config.json"]
    assert settings("slice_config") == [7, True, 336, 0.5, 0.5, 0.5]
    del copy.config["slice_config"]
    assert settings("defaults") == [9, True, 448, 0.5, 0.5, 0.5]


def test_computed_buffers_of_some_exporters_are_left_out(copy: CheckpointCopy, tmp_path: Path) -> None:
    expected = files_of(copy.write(tmp_path / "plain"), tmp_path / "plain-out")
    copy.tensors["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = stored(np.ones(32))
    copy.tensors["resampler.pos_embed"] = stored(np.ones((70, 70, 256)))
    assert files_of(copy.write(tmp_path / "buffers"), tmp_path / "buffers-out") == expected
