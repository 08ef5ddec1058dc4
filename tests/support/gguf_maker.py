"""GGUF files made byte by byte: sound tiny models, and broken ones of every kind.

`Gguf` writes what it is told, checks nothing and so can contradict itself, which `gguf.GGUFWriter` refuses to do.
Scripts load this file by its path, outside of `sys.modules`: annotations of dataclasses are not strings for that.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf import GGMLQuantizationType as Type

from edge_converters.plan.encode_rows import encode_rows

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

HIDDEN, VOCABULARY = 128, 64  # 128 is the narrowest a resampler can be
SPECIAL = ["<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"]
SPECIAL += ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    """A value of any type except an array."""
    return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def array(kind: int, values: Sequence[Any]) -> bytes:
    """An array value: element type, count, elements."""
    return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)


@dataclass
class Tensor:
    """One tensor entry and its bytes; `offset` None means: where it belongs."""

    name: str
    dims: tuple[int, ...]
    """GGUF order: columns first."""
    type: int
    data: bytes
    offset: int | None = None


@dataclass
class Gguf:
    """A file in parts; change any of them, then `build`."""

    keys: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_keys: int | None = None
    n_tensors: int | None = None
    more_keys: bytes = b""
    """Raw bytes after the last key, for example a key that exists already; count them in `n_keys`."""
    more_tensors: bytes = b""

    def key(self, name: str, kind: int, value: Any) -> Self:
        """Set a scalar key."""
        self.keys[name] = (kind, scalar(kind, value))
        return self

    def array(self, name: str, kind: int, values: Sequence[Any]) -> Self:
        """Set an array key."""
        self.keys[name] = (ARRAY, array(kind, values))
        return self

    def tensor(self, name: str, shape: tuple[int, ...], kind: Type = Type.F32, seed: int = 0) -> Self:
        """Add a tensor of small random numbers; `shape` in NumPy order."""
        values = np.random.default_rng(seed).standard_normal((int(np.prod(shape[:-1])), shape[-1])) / 8
        blocks = encode_rows(values.astype(np.float32), kind)
        self.tensors[name] = Tensor(name, shape[::-1], int(kind), blocks.tobytes())
        return self

    def padded_tensor(self, name: str, shape: tuple[int, int], kind: Type, seed: int = 0) -> Self:
        """Add a matrix whose rows are stored with zeros up to the next multiple of 32, and the key that says so."""
        n_rows, n_columns = shape
        values = np.zeros((n_rows, padded(n_columns, 32)), np.float32)
        values[:, :n_columns] = np.random.default_rng(seed).standard_normal(shape) / 8
        self.tensors[name] = Tensor(name, values.shape[::-1], int(kind), encode_rows(values, kind).tobytes())
        return self.key(f"edge_runtime.row_length.{name}", U32, n_columns)

    def header(self) -> bytes:
        """Everything before the tensor data, without padding."""
        parts = [
            self.magic,
            struct.pack("<I", self.version),
            struct.pack("<Q", len(self.tensors) if self.n_tensors is None else self.n_tensors),
            struct.pack("<Q", len(self.keys) if self.n_keys is None else self.n_keys),
            *(text(name) + struct.pack("<I", kind) + raw for name, (kind, raw) in self.keys.items()),
            self.more_keys,
        ]
        position = 0
        for tensor in self.tensors.values():
            offset = position if tensor.offset is None else tensor.offset
            parts.append(tensor_entry(tensor.name, tensor.dims, tensor.type, offset))
            position += padded(len(tensor.data), self.alignment)
        return b"".join([*parts, self.more_tensors])

    def build(self) -> bytes:
        """The whole file."""
        header = self.header()
        parts = [header.ljust(padded(len(header), self.alignment), b"\0")]
        parts += [t.data.ljust(padded(len(t.data), self.alignment), b"\0") for t in self.tensors.values()]
        return b"".join(parts)

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.write_bytes(self.build())
        return path


def tensor_entry(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """One entry of the tensor list."""
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", d) for d in dims)
        + struct.pack("<IQ", kind, offset)
    )


def padded(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to the alignment."""
    return -(-n_bytes // alignment) * alignment


def mini_decoder(n_layers: int = 1) -> Gguf:
    """A complete Qwen3 decoder of 50 KB that llama.cpp runs."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, "Ġ", "Ċ", "Ġa", "an", "Ġan"]
    tokens += [f"[{i}]" for i in range(VOCABULARY - len(tokens) - len(SPECIAL))] + SPECIAL
    file = Gguf()
    file.key("general.architecture", STRING, "qwen3")
    for name, value in {
        "block_count": n_layers,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
    }.items():
        file.key(f"qwen3.{name}", U32, value)
    file.key("qwen3.attention.layer_norm_rms_epsilon", F32, 1e-6)
    file.key("qwen3.rope.freq_base", F32, 1e6)
    file.key("general.quantization_version", U32, 2)
    file.key("tokenizer.ggml.model", STRING, "gpt2")
    file.key("tokenizer.ggml.pre", STRING, "qwen2")
    file.array("tokenizer.ggml.tokens", STRING, tokens)
    file.array("tokenizer.ggml.token_type", I32, [1] * (VOCABULARY - len(SPECIAL)) + [3] * len(SPECIAL))
    file.array("tokenizer.ggml.merges", STRING, ["Ġ a", "a n", "Ġa n"])
    file.key("tokenizer.ggml.bos_token_id", U32, VOCABULARY - 1)
    file.key("tokenizer.ggml.eos_token_id", U32, VOCABULARY - 2)
    file.key("tokenizer.ggml.add_bos_token", BOOL, 0)
    file.tensor("token_embd.weight", (VOCABULARY, HIDDEN), Type.Q8_0)
    file.tensor("output_norm.weight", (HIDDEN,))
    for n in range(n_layers):
        file.tensor(f"blk.{n}.attn_norm.weight", (HIDDEN,))
        file.tensor(f"blk.{n}.attn_q.weight", (64, HIDDEN), Type.Q8_0, n)
        file.tensor(f"blk.{n}.attn_k.weight", (32, HIDDEN), Type.F16, n)
        file.tensor(f"blk.{n}.attn_v.weight", (32, HIDDEN), Type.F16, n)
        file.tensor(f"blk.{n}.attn_output.weight", (HIDDEN, 64), Type.Q4_0, n)
        file.tensor(f"blk.{n}.attn_q_norm.weight", (32,))
        file.tensor(f"blk.{n}.attn_k_norm.weight", (32,))
        file.tensor(f"blk.{n}.ffn_norm.weight", (HIDDEN,))
        file.tensor(f"blk.{n}.ffn_gate.weight", (32, HIDDEN), Type.Q4_0, n)
        file.tensor(f"blk.{n}.ffn_up.weight", (32, HIDDEN), Type.Q4_0, n)
        file.tensor(f"blk.{n}.ffn_down.weight", (HIDDEN, 32), Type.Q8_0, n)
    return file


def mini_mmproj(hidden: int = HIDDEN) -> Gguf:
    """A complete vision tower and resampler of 60 KB, with slices of 8 x 8 pixels; the rows of fc2 are padded."""
    width, mlp, patch, matrix = 32, 40, 4, Type.Q4_0
    file = Gguf()
    file.key("general.architecture", STRING, "clip")
    file.key("clip.projector_type", STRING, "edge_runtime.resampler")
    for name, value in {
        "minicpmv_version": 6,
        "vision.image_size": 8,
        "vision.patch_size": patch,
        "vision.embedding_length": width,
        "vision.feed_forward_length": mlp,
        "vision.attention.head_count": 2,
        "vision.block_count": 1,
    }.items():
        file.key(f"clip.{name}", U32, value)
    file.key("clip.vision.attention.layer_norm_epsilon", F32, 1e-6)
    file.array("clip.vision.image_mean", F32, [0.5] * 3)
    file.array("clip.vision.image_std", F32, [0.5] * 3)
    file.key("edge_runtime.max_slice_nums", U32, 9)
    file.key("edge_runtime.use_image_id", BOOL, 1)
    file.tensor("v.patch_embd.weight", (width, 3, patch, patch), Type.F16)
    file.tensor("v.patch_embd.bias", (width,))
    file.tensor("v.position_embd.weight", (16, width), Type.F16)
    for name in ("ln1", "ln2"):
        file.tensor(f"v.blk.0.{name}.weight", (width,)).tensor(f"v.blk.0.{name}.bias", (width,))
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        file.tensor(f"v.blk.0.{name}.weight", (width, width), matrix).tensor(f"v.blk.0.{name}.bias", (width,))
    file.tensor("v.blk.0.ffn_down.weight", (mlp, width), matrix).tensor("v.blk.0.ffn_down.bias", (mlp,))
    file.padded_tensor("v.blk.0.ffn_up.weight", (width, mlp), matrix).tensor("v.blk.0.ffn_up.bias", (width,))
    file.tensor("v.post_ln.weight", (width,)).tensor("v.post_ln.bias", (width,))
    file.tensor("resampler.query", (4, hidden))
    file.tensor("resampler.kv.weight", (hidden, width), matrix)
    for name in ("attn.q", "attn.k", "attn.v", "attn.out"):
        file.tensor(f"resampler.{name}.weight", (hidden, hidden), matrix).tensor(f"resampler.{name}.bias", (hidden,))
    file.tensor("resampler.proj.weight", (hidden, hidden), matrix)
    for name in ("ln_q", "ln_kv", "ln_post"):
        file.tensor(f"resampler.{name}.weight", (hidden,)).tensor(f"resampler.{name}.bias", (hidden,))
    return file
