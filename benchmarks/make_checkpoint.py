"""Write a random MiniCPM-V 4.5 checkpoint in the official layout, with the real widths and vocabulary.

    python benchmarks/make_checkpoint.py FOLDER [--gb 4] [--tokenizer DIR] [--seed 0]

Embedding, head, vision tower and resampler have their full size (3.5 GB together); as many decoder layers as fit into
`--gb` are added, at least one. Weights are bfloat16 in shards of at most 5 GB with an index. All tensors take their
values from one block of normal random numbers, each from another offset, so that writing runs at the disk's speed and
in little memory.

The tokenizer files come from DIR (vocab.json, merges.txt, added_tokens.json, special_tokens_map.json); without it the
test fixtures' vocabulary is filled up to the right size, with few merges.

The last line is one JSON object: `folder`, `bytes`, `parameters`, `decoder_layers`, `shards`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

VOCABULARY, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 151748, 4096, 12288, 32, 8, 128
VISION, VISION_MLP, VISION_LAYERS, VISION_HEADS, PATCH, POSITIONS, QUERIES = 1152, 4304, 27, 16, 14, 70, 64
BASE_VOCABULARY = 151643  # ids from here on are added tokens
UNK_ID = 128244  # inside the base vocabulary, marked as special

SHARD_BYTES = 5_000_000_000  # four shards at full size, as the official checkpoint has
BLOCK_VALUES = (8 << 20) + 61  # odd, so that rows do not repeat
SPREAD = 0.02  # as in initialisation; norms get 1 ± SPREAD

FIXTURE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "checkpoint"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")

Shape = tuple[int, ...]


def decoder_layer(n: int) -> dict[str, Shape]:
    """Tensors of one decoder layer."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, Shape] = {
        "self_attn.q_proj": (q, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, q),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"llm.model.layers.{n}.{name}.weight": shape for name, shape in shapes.items()}


def vision_tensors() -> dict[str, Shape]:
    """Tensors of the vision tower and the resampler."""

    def affine(name: str, shape: Shape) -> dict[str, Shape]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes = affine("vpm.embeddings.patch_embedding", (VISION, 3, PATCH, PATCH))
    shapes["vpm.embeddings.position_embedding.weight"] = (POSITIONS**2, VISION)
    for n in range(VISION_LAYERS):
        layer = f"vpm.encoder.layers.{n}"
        for part in ("q", "k", "v", "out"):
            shapes |= affine(f"{layer}.self_attn.{part}_proj", (VISION, VISION))
        shapes |= affine(f"{layer}.layer_norm1", (VISION,)) | affine(f"{layer}.layer_norm2", (VISION,))
        shapes |= affine(f"{layer}.mlp.fc1", (VISION_MLP, VISION)) | affine(f"{layer}.mlp.fc2", (VISION, VISION_MLP))
    shapes |= affine("vpm.post_layernorm", (VISION,))
    shapes["resampler.query"] = (QUERIES, HIDDEN)
    shapes["resampler.proj"] = (HIDDEN, HIDDEN)
    shapes["resampler.kv_proj.weight"] = (HIDDEN, VISION)
    shapes["resampler.attn.in_proj_weight"] = (3 * HIDDEN, HIDDEN)
    shapes["resampler.attn.in_proj_bias"] = (3 * HIDDEN,)
    shapes |= affine("resampler.attn.out_proj", (HIDDEN, HIDDEN))
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes |= affine(f"resampler.{name}", (HIDDEN,))
    return shapes


def n_bytes(shapes: dict[str, Shape]) -> int:
    """Bytes of the tensors in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in shapes.values())


def plan(target_bytes: float) -> tuple[dict[str, Shape], int]:
    """All tensors of a checkpoint of about `target_bytes`, and how many decoder layers it has."""
    shapes: dict[str, Shape] = {"llm.model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    rest: dict[str, Shape] = {"llm.model.norm.weight": (HIDDEN,), "llm.lm_head.weight": (VOCABULARY, HIDDEN)}
    rest |= vision_tensors()
    n_layers = max(1, int((target_bytes - n_bytes(shapes | rest)) / n_bytes(decoder_layer(0))))
    for n in range(n_layers):
        shapes |= decoder_layer(n)
    return shapes | rest, n_layers


class Values:
    """An endless supply of bfloat16 bits, from one block of random numbers."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._block = _bfloat16(random.standard_normal(BLOCK_VALUES, np.float32) * SPREAD)
        self._around_one = _bfloat16(1 + random.standard_normal(HIDDEN, np.float32) * SPREAD)
        self._position = 0

    def write(self, file: BinaryIO, name: str, shape: Shape) -> None:
        """Append one tensor to a file."""
        count = math.prod(shape)
        if ("norm" in name or ".ln_" in name) and name.endswith(".weight"):
            file.write(self._around_one[:count].data)
            return
        while count:
            part = self._block[self._position : self._position + count]
            file.write(part.data)
            count -= len(part)
            self._position = (self._position + len(part)) % BLOCK_VALUES


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def shards(shapes: dict[str, Shape]) -> Iterator[dict[str, Shape]]:
    """Cut the tensors into shards, in order."""
    shard: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if shard and n_bytes(shard) + 2 * math.prod(shape) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_weights(folder: Path, shapes: dict[str, Shape], seed: int) -> int:
    """Write the shards and their index; return how many shards there are."""
    values, parts = Values(seed), list(shards(shapes))
    weight_map = {}
    for number, shard in enumerate(parts, 1):
        file_name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        ends = list(itertools.accumulate(2 * math.prod(shape) for shape in shard.values()))
        header = {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            for (name, shape), start, end in zip(shard.items(), [0, *ends], ends, strict=False)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shard.items():
                values.write(file, name, shape)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": n_bytes(shapes)}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return len(parts)


def write_config(folder: Path, n_layers: int) -> None:
    """Write config.json and preprocessor_config.json: the fixtures' with the real sizes."""
    config = json.loads((FIXTURE / "config.json").read_text("utf-8")) | {
        "_name_or_path": "random",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_num": QUERIES,
        "bos_token_id": BASE_VOCABULARY,
        "eos_token_id": BASE_VOCABULARY + 2,
    }
    config["vision_config"] |= {
        "hidden_size": VISION,
        "intermediate_size": VISION_MLP,
        "num_attention_heads": VISION_HEADS,
        "num_hidden_layers": VISION_LAYERS,
    }
    _write_json(folder / "config.json", config)
    shutil.copyfile(FIXTURE / "preprocessor_config.json", folder / "preprocessor_config.json")


def write_tokenizer(folder: Path, given: Path | None) -> None:
    """Write the tokenizer files: copied from `given`, or made up; the settings are the fixtures' with moved ids."""
    vocabulary = json.loads((FIXTURE / "vocab.json").read_text("utf-8"))
    moved = {len(vocabulary) + n: BASE_VOCABULARY + n for n in range(VOCABULARY - BASE_VOCABULARY)}
    moved[vocabulary["<unk>"]] = UNK_ID
    settings = json.loads((FIXTURE / "tokenizer_config.json").read_text("utf-8"))
    settings["added_tokens_decoder"] = {
        str(moved[int(old)]): token for old, token in settings["added_tokens_decoder"].items()
    }
    _write_json(folder / "tokenizer_config.json", settings)
    if given is not None:
        for name in TOKENIZER_FILES:
            shutil.copyfile(given / name, folder / name)
        return
    for name in ("merges.txt", "special_tokens_map.json"):
        shutil.copyfile(FIXTURE / name, folder / name)
    added = json.loads((FIXTURE / "added_tokens.json").read_text("utf-8"))
    _write_json(folder / "added_tokens.json", {text: moved[old] for text, old in added.items()})
    _write_json(folder / "vocab.json", made_up_vocabulary(vocabulary))


def made_up_vocabulary(known: dict[str, int]) -> dict[str, int]:
    """`known` without its `<unk>`, filled up with distinct strings of byte characters to the real size."""
    texts = [text for text in known if text != "<unk>"]
    taken = set(texts)
    letters = [text for text in texts if len(text) == 1]
    words = ("".join(word) for length in (3, 4) for word in itertools.product(letters, repeat=length))
    fresh = (word for word in words if word not in taken)
    texts += itertools.islice(fresh, BASE_VOCABULARY - 1 - len(texts))
    texts.insert(UNK_ID, "<unk>")
    return {text: i for i, text in enumerate(texts)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=4.0, help="size in GB of 10^9 bytes (default 4)")
    parser.add_argument("--tokenizer", type=Path, help="folder with the real tokenizer's files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes, n_layers = plan(arguments.gb * 1e9)
    write_config(folder, n_layers)
    write_tokenizer(folder, arguments.tokenizer)
    n_shards = write_weights(folder, shapes, arguments.seed)
    summary = {
        "folder": folder.name,
        "bytes": n_bytes(shapes),
        "parameters": n_bytes(shapes) // 2,
        "decoder_layers": n_layers,
        "shards": n_shards,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
