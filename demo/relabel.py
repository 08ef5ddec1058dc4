"""Add the skeleton's missing tokens to a decoder file of the demo model, and mark it as a toy.

    python demo/relabel.py edge_runtime/demo/ggml-model-Q4_K_M.gguf

The shipped model was trained before its tokenizer had the official added tokens for tool calls and places. Rows that
no token used get their names. Training treats those rows like every token that is never an answer (the output rows
of unused tokens and of `<image>` or `<think>` point the same way, cosine 0.99), so no tensor is touched, and no
answer changes. A file converted from a checkpoint with today's skeleton already has all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys, TokenType
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edge_runtime.weights.config import KEY_TOY

SKELETON = Path(__file__).parent / "skeleton"


def relabel(source: Path, target: Path) -> list[str]:
    """Write a copy of a decoder file with the skeleton's added tokens.

    Returns
    -------
    added : the tokens that the file lacked.

    Raises
    ------
    ValueError
        When a token's row is in use.
    """
    reader = GGUFReader(source)
    tokens, types = (reader.fields[key].contents() for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE))
    added = []
    for token in json.loads((SKELETON / "tokenizer.json").read_text("utf-8"))["added_tokens"]:
        row, text = token["id"], token["content"]
        if tokens[row] == text:
            continue
        if types[row] != TokenType.UNUSED or text in tokens:
            raise ValueError(f"{source} has {tokens[row]!r} in row {row}, expected an unused one for {text}")
        tokens[row] = text
        types[row] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        added.append(text)
    changed = {
        Keys.Tokenizer.LIST: MetadataDetails(GGUFValueType.ARRAY, tokens, sub_type=GGUFValueType.STRING),
        Keys.Tokenizer.TOKEN_TYPE: MetadataDetails(GGUFValueType.ARRAY, types, sub_type=GGUFValueType.INT32),
        KEY_TOY: MetadataDetails(GGUFValueType.BOOL, True),
    }
    writer = GGUFWriter(target, reader.fields[Keys.General.ARCHITECTURE].contents(), endianess=reader.endianess)
    copy_with_new_metadata(reader, writer, changed, [])
    return added


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    unfinished = file.with_suffix(".unfinished")
    added = relabel(file, unfinished)
    unfinished.replace(file)
    print(f"{file}: added {', '.join(added) or 'nothing'}")


if __name__ == "__main__":
    main()
