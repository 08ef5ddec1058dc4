"""Time what a schema costs per token, against llama.cpp's grammars.

    python benchmarks/structured.py models/minicpm-v/ggml-model-Q4_K_M.gguf [--tokens 200]

Only the decoder file's vocabulary is used. The logits are random with a bias towards brackets and quotes, so that
texts look like JSON; both sides follow the tokens that ours chose. Ours is the whole of `Constraint.next_token`: the
mask, the sampler's choice among the allowed tokens, the way to the end when that is near. The peer is llama.cpp's
grammar sampler over the whole vocabulary, as its own chain runs it, with the grammar from llama-cpp-python's
converter and without choosing a token.

The last line is one JSON object: `scenario`, `ours_s` and `peers_s` (medians per token, by schema), and all samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

for root in ("", "kernels"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / root))

SCHEMAS: dict[str, dict[str, Any]] = {
    "invoice": {
        "type": "object",
        "properties": {
            "number": {"type": "string"},
            "currency": {"enum": ["EUR", "USD"]},
            "lines": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"text": {"type": "string"}, "amount": {"type": "number"}},
                    "required": ["text", "amount"],
                },
            },
        },
        "required": ["number", "currency", "lines"],
    },
    "text": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    "map": {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 5},
}


def ours(vocabulary: Any, schema: dict[str, Any], n_tokens: int, n_rows: int) -> tuple[list[int], list[float], float]:
    """Tokens of an answer, seconds per token, and seconds to compile the schema."""
    import numpy as np

    from edge_runtime.generation.sampling import Sampler, SamplingOptions
    from edge_runtime.structured_output.constraint import AnswerForm
    from edge_runtime.structured_output.grammar import Grammar

    started = time.perf_counter()
    constraint = AnswerForm(Grammar(schema, vocabulary), n_tokens).start()
    compile_s = time.perf_counter() - started
    sampler = Sampler(SamplingOptions.official(thinking=False), n_rows, n_tokens)
    random, ids, samples = np.random.default_rng(0), [], []
    for left in range(n_tokens, 0, -1):
        logits = random.normal(0, 3, n_rows).astype(np.float32)
        logits[[vocabulary.byte_tokens[byte] for byte in b'",}]']] += 8
        started = time.perf_counter()
        token = constraint.next_token(left, lambda allowed, logits=logits: sampler.choose(allowed, logits))
        samples.append(time.perf_counter() - started)
        sampler.accept(token)
        ids.append(token)
        if constraint.ended:
            break
    sampler.close()
    return ids, samples, compile_s


def peer(path: Path, schema: dict[str, Any], ids: list[int], n_rows: int) -> list[float]:
    """Seconds that llama.cpp's grammar sampler takes for each token."""
    import numpy as np
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    from edge_runtime.decoder import llama_cpp as llama
    from edge_runtime.generation.sampling import CANDIDATE

    lib = llama.library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    grammar = json_schema_to_gbnf(json.dumps(schema)).encode()
    sampler = lib.llama_sampler_init_grammar(lib.llama_model_get_vocab(model), grammar, b"root")
    samples = []
    for token in ids:
        candidates = np.zeros(n_rows, CANDIDATE)
        candidates["id"] = np.arange(n_rows)
        data = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(data, n_rows, -1, False)
        started = time.perf_counter()
        lib.llama_sampler_apply(sampler, ctypes.byref(array))
        samples.append(time.perf_counter() - started)
        if candidates["logit"][token] != 0:  # it orders properties or writes whitespace differently
            break
        lib.llama_sampler_accept(sampler, token)
    lib.llama_sampler_free(sampler)
    lib.llama_model_free(model)
    return samples


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    from edge_runtime.prompt.tokenizer import Tokenizer
    from edge_runtime.structured_output.vocabulary import GrammarVocabulary
    from edge_runtime.weights.gguf_file import GGUFFile

    started = time.perf_counter()
    import llguidance  # noqa: F401 - its import is timed

    import_s = time.perf_counter() - started
    tokenizer = Tokenizer(GGUFFile(arguments.decoder))
    tokenizer.encode("x")  # loads the merges, which must not count
    n_rows = len(tokenizer.tokens)
    started = time.perf_counter()
    vocabulary = GrammarVocabulary(tokenizer, n_rows)
    vocabulary_s = time.perf_counter() - started
    print(f"{n_rows} tokens; llguidance imported in {import_s:.3f} s, vocabulary prepared in {vocabulary_s:.2f} s")
    print(f"{'schema':<12} {'tokens':>6} {'compile':>9} {'ours':>9} {'longest':>9} {'llama.cpp':>10}  ms per token")
    samples: dict[str, Any] = {}
    for name, schema in SCHEMAS.items():
        ids, mine, compile_s = ours(vocabulary, schema, arguments.tokens, n_rows)
        theirs = peer(arguments.decoder, schema, ids, n_rows)
        samples[name] = {"ours": mine, "llama.cpp": theirs, "compile": compile_s}
        row = [
            1e3 * seconds for seconds in (compile_s, statistics.median(mine), max(mine), statistics.median(theirs))
        ]
        print(f"{name:<12} {len(ids):>6} {row[0]:>9.2f} {row[1]:>9.2f} {row[2]:>9.2f} {row[3]:>10.2f}")
    result = {
        "scenario": "structured",
        "ours_s": {name: statistics.median(sample["ours"]) for name, sample in samples.items()},
        "peers_s": {"llama.cpp": {name: statistics.median(sample["llama.cpp"]) for name, sample in samples.items()}},
        "import_s": import_s,
        "vocabulary_s": vocabulary_s,
        "samples_s": samples,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
