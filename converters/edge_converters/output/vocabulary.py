"""The tokenizer of a checkpoint → the `tokenizer.*` keys of a GGUF file.

It is read from vocab.json + merges.txt + added tokens (the official layout) or from tokenizer.json alone. Only the
byte-level BPE of Qwen2/Qwen3 with its split pattern is accepted, since `tokenizer.ggml.pre = qwen2` promises that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime.errors import CheckpointError
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.prompt.tokenizer import NORMALIZER_KEY, QWEN2_PATTERN


@dataclass
class Vocabulary:
    """A distinct text for every row of the embedding table, and the tokenizer's settings."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    """Pairs joined by one space, most frequent first."""
    normalizer: str
    """`nfc` or `none`."""
    chat_template: str
    special_ids: dict[str, int]
    """Those of bos, eos, unknown and padding that the checkpoint names."""

    def write(self, writer: GGUFWriter) -> None:
        """Add the `tokenizer.*` keys to a file being written."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, token_id in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        writer.add_add_bos_token(False)
        writer.add_chat_template(self.chat_template)
        writer.add_string(NORMALIZER_KEY, self.normalizer)


def read_vocabulary(checkpoint: Checkpoint, n_rows: int) -> Vocabulary:
    """Read the tokenizer of `checkpoint`, whose embedding table has `n_rows`.

    Raises
    ------
    CheckpointError
        When there is no tokenizer, when it is of another kind or damaged, or when a token has no row.
    """
    try:
        return _read(checkpoint, n_rows)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:  # valid JSON, but not a tokenizer's
        raise CheckpointError(
            f"The tokenizer files of {checkpoint.folder} do not have the usual form ({error!r}); download them again."
        ) from None


def _read(checkpoint: Checkpoint, n_rows: int) -> Vocabulary:
    settings = checkpoint.json("tokenizer_config.json") or {}
    fast = checkpoint.json("tokenizer.json")
    normalizer = "nfc"
    vocabulary, pairs = checkpoint.json("vocab.json"), checkpoint.text("merges.txt")
    if vocabulary is not None and pairs is not None:
        base, merges = vocabulary, _read_merges(pairs)
    elif fast is not None:
        base, merges = _from_tokenizer_json(fast)
        normalizer = "nfc" if (fast.get("normalizer") or {}).get("type") == "NFC" else "none"
    else:
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer; expected vocab.json and merges.txt, or tokenizer.json, as in "
            "the official checkpoint."
        )
    _check(base, merges)
    added = _added_tokens(checkpoint, settings, fast, base)
    texts = {int(token_id): text for text, token_id in base.items()} | {i: text for i, (text, _) in added.items()}
    beyond = [i for i in texts if not 0 <= i < n_rows]
    if beyond:
        raise CheckpointError(
            f"The tokenizer has a token with id {beyond[0]}, but the embedding table has only {n_rows} rows; the "
            "files belong to different models."
        )
    tokens, types = _fill(texts, added, n_rows)
    return Vocabulary(
        tokens,
        types,
        merges,
        normalizer,
        _chat_template(checkpoint, settings),
        _special_ids(checkpoint, settings, texts),
    )


def _check(base: dict[str, int], merges: list[str]) -> None:
    """Refuse what no tokenizer could be built from; otherwise it would only show when the file is loaded."""
    odd = next((text for text, i in base.items() if type(i) is not int), None)
    if odd is not None or len(set(base.values())) < len(base):
        what = "one id for several tokens" if odd is None else f"no whole number as id of {odd[:40]!r}"
        raise CheckpointError(f"The tokenizer's vocabulary has {what}; use the original tokenizer files.")
    for merge in merges:
        parts = merge.split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= base.keys():
            raise CheckpointError(
                f"The tokenizer has the merge {merge[:40]!r}, expected two tokens of the vocabulary that make a "
                "third; use the original tokenizer files."
            )


def _fill(
    texts: dict[int, str], added: dict[int, tuple[str, bool]], n_rows: int
) -> tuple[list[str], list[TokenType]]:
    """Give every row a distinct text; llama.cpp aborts the process on duplicates."""
    taken = set(texts.values())
    tokens, types = [], []
    for row in range(n_rows):
        if row not in texts:
            name = f"[PAD{row}]"
            while name in taken:
                name = f"[{name}]"
            taken.add(name)
            tokens.append(name)
            types.append(TokenType.UNUSED)
            continue
        tokens.append(texts[row])
        is_special = added[row][1] if row in added else None
        types.append(
            TokenType.NORMAL if is_special is None else TokenType.CONTROL if is_special else TokenType.USER_DEFINED
        )
    if len(set(tokens)) != n_rows:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise CheckpointError(
            f"The tokenizer has the token {twice!r} under two ids; use the original tokenizer files."
        )
    return tokens, types


def _read_merges(text: str) -> list[str]:
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


def _from_tokenizer_json(fast: Any) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of a tokenizer.json, after checking that it is of the Qwen2 kind."""
    model = fast.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"tokenizer.json is of type {model.get('type')!r}; expected the byte-level BPE of Qwen2."
        )
    pre = fast.get("pre_tokenizer") or {}
    patterns = [step.get("pattern", {}).get("Regex") for step in pre.get("pretokenizers", [pre])]
    if QWEN2_PATTERN not in patterns:
        raise CheckpointError(
            "tokenizer.json splits text by another pattern than Qwen2's; such a file cannot be described to "
            "llama.cpp as 'qwen2'."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    return model.get("vocab", {}), merges


def _added_tokens(
    checkpoint: Checkpoint, settings: Any, fast: Any, base: dict[str, int]
) -> dict[int, tuple[str, bool]]:
    """Id → (text, is special) of every token that is matched before BPE; later sources win."""
    special_map = checkpoint.json("special_tokens_map.json") or {}
    names = {_text(value) for key, value in special_map.items() if key != "additional_special_tokens"}
    names |= {_text(value) for value in special_map.get("additional_special_tokens", [])}
    # MiniCPM-V marks `<unk>`, a token of the base vocabulary, as special in this way.
    added = {base[text]: (text, True) for text in names if text in base}
    added |= {i: (text, text in names) for text, i in (checkpoint.json("added_tokens.json") or {}).items()}
    for token in (fast or {}).get("added_tokens", []):
        added[int(token["id"])] = (token["content"], bool(token["special"]))
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        added[int(token_id)] = (token["content"], bool(token["special"]))
    return added


def _text(token: Any) -> str:
    """Text of a special token, which is written as a string or as an object with `content`."""
    return str(token["content"] if isinstance(token, dict) else token)


def _chat_template(checkpoint: Checkpoint, settings: Any) -> str:
    if (text := checkpoint.text("chat_template.jinja")) is not None:
        return text
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) and template else OFFICIAL_CHAT_TEMPLATE


def _special_ids(checkpoint: Checkpoint, settings: Any, texts: dict[int, str]) -> dict[str, int]:
    by_text = {text: i for i, text in texts.items()}
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        text = settings.get(f"{key}_token")
        token_id = by_text.get(_text(text)) if text else checkpoint.config.get(f"{key}_token_id")
        if isinstance(token_id, int) and token_id in texts:
            ids[name] = token_id
    if "eos" not in ids:
        raise CheckpointError(
            "The checkpoint names no end token (eos_token or eos_token_id), so answers would never end."
        )
    return ids
