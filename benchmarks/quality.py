"""What quantisation costs in answers: one checkpoint, every decoder and vision type, the same held-out samples.

    python benchmarks/quality.py demo/run/checkpoint --samples 100 --json benchmarks/results/quality.json [--plot SVG]

For each pair of types: share of right answers (average of the core skills, and each), agreement with float32 (equal
answers, right or wrong), and mean answer loss: the negative log probability per token of the right answer and its
end, which still changes where accuracy is saturated. At the same tokens, against float32: the Kullback-Leibler
divergence of the probabilities in nats, and how often the most probable token is the same. Vision types vary with a
float32 decoder and vice versa; the shipped pair and all-float32 are always included.

Two arithmetics: `exact` is float32 throughout, as `--exact`; `int8` is the default, which also rounds the inputs of
the tower's products. Decoder types are compared in `exact`, so that nothing else changes, and everything that
concerns the vision file in both. The reference is all-float32 in `exact`. The last line is one JSON object.

With `--types` only these decoder types are measured, in `exact` with a float32 vision file, and with `--calibrate`
each of them twice, without and with an importance matrix from the pictures and texts in a folder. The result also
says which types the tensors got: rows that are no multiple of 256 get others.

With a folder of GGUF files instead of a checkpoint, these files are measured as they are: `exact`, which is the
reference then, and `int8` with llama.cpp's products in the decoder and with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
for folder in (".", "kernels", "converters"):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.plot import plot_quality  # noqa: E402
from demo.data import CORE  # noqa: E402
from demo.evaluate import ask, draw  # noqa: E402
from demo.sample import Sample  # noqa: E402
from edge_converters import convert_checkpoint  # noqa: E402
from edge_converters.plan.recipes import DECODER_TYPES, VISION_TYPES  # noqa: E402
from edge_kernels.machine import cpu_name, isa  # noqa: E402
from edge_runtime import Model, __version__  # noqa: E402
from edge_runtime.decoder.kernel_products import VARIABLE  # noqa: E402
from edge_runtime.weights.gguf_file import GGUFFile  # noqa: E402

FLOAT, SHIPPED = ("f32", "f32"), ("q4_k_m", "q8_0")
LEFT_OUT = {"bf16"}  # as large as f16
DECODERS = [name for name in DECODER_TYPES if name not in LEFT_OUT | {"f32"}]
VISIONS = [name for name in VISION_TYPES if name not in LEFT_OUT | {"f32"}]
SMALL = [(SHIPPED[0], name) for name in VISIONS if name != "f16"]
PAIRS = list(dict.fromkeys([FLOAT, *((d, "f32") for d in DECODERS), *(("f32", v) for v in VISIONS), *SMALL, SHIPPED]))


def arithmetics(decoder: str, vision: str) -> list[str]:
    """The arithmetics that a pair is measured in, the reference first."""
    return ["exact"] if vision == "f32" and decoder != "f32" else ["exact", "int8"]


Logs = list[np.ndarray]
"""One ndarray [shape=(tokens, vocabulary), float32] per sample: log probabilities before each token of the answer."""


def wanted_tokens(model: Model, sample: Sample) -> list[int]:
    """Tokens of the right answer and its end."""
    return [*model.tokenizer.encode(sample.answer), model.tokenizer.ids["<|im_end|>"]]


def log_probabilities(model: Model, sample: Sample) -> np.ndarray:
    """Log probabilities before each token of the right answer: ndarray [shape=(tokens, vocabulary), float32]."""
    wanted = wanted_tokens(model, sample)
    prepared = model.prepare(sample.messages(), **sample.options())

    def compute() -> np.ndarray:
        decoder, rows = model.engine.decoder, []
        decoder.prefill(model.embeddings(prepared))
        for i, token in enumerate(wanted):
            rows.append(log_softmax(decoder.logits()))
            if i + 1 < len(wanted):
                decoder.decode(token)
        return np.stack(rows)

    return np.asarray(model.engine.run(compute))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities, computed in double precision, returned in float32."""
    logits = logits.astype(np.float64)
    top = logits.max()
    return (logits - top - np.log(np.exp(logits - top).sum())).astype(np.float32)


def divergence(reference: Logs, logs: Logs) -> tuple[float, float]:
    """Mean Kullback-Leibler divergence from the reference in nats, and how often the most probable token is equal."""
    one, other = (np.concatenate(rows).astype(np.float64) for rows in (reference, logs))
    nats = (np.exp(one) * (one - other)).sum(axis=1)
    return float(nats.mean()), float(np.mean(one.argmax(axis=1) == other.argmax(axis=1)))


def measure(folder: Path, samples: dict[str, list[Sample]], *, exact: bool) -> dict[str, Any]:
    """Answers and losses of one pair of files."""
    with Model.load(folder, exact=exact) as model:
        answers = {kind: [ask(model, sample) for sample in group] for kind, group in samples.items()}
        logs = {kind: [log_probabilities(model, sample) for sample in group] for kind, group in samples.items()}
        losses = {
            kind: [
                -float(np.mean(rows[np.arange(len(rows)), wanted_tokens(model, sample)]))
                for rows, sample in zip(logs[kind], group, strict=True)
            ]
            for kind, group in samples.items()
        }
    right = {
        kind: float(np.mean([a == s.answer for a, s in zip(answers[kind], group, strict=True)]))
        for kind, group in samples.items()
    }
    return {
        "answers": answers,
        "logs": [rows for group in logs.values() for rows in group],
        "right": right,
        "average": float(np.mean(list(right.values()))),
        "loss": float(np.mean([np.mean(values) for values in losses.values()])),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.gguf")),
    }


def agreement(answers: dict[str, list[str]], reference: dict[str, list[str]]) -> float:
    """Share of answers equal to the reference's."""
    pairs = [(a, b) for kind in reference for a, b in zip(answers[kind], reference[kind], strict=True)]
    return float(np.mean([a == b for a, b in pairs]))


def types_of(decoder: Path) -> dict[str, int]:
    """Bytes of a decoder file's matrices by type."""
    found: dict[str, int] = {}
    for info in GGUFFile(decoder).tensors.values():
        if len(info.shape) > 1:
            found[info.type.name] = found.get(info.type.name, 0) + info.n_bytes
    return found


def run(
    checkpoint: Path, count: int, *, exact_only: bool, types: list[str] | None = None, pictures: Path | None = None
) -> list[dict[str, Any]]:
    """Measure all pairs, or some decoder types; print a row of the table after each."""
    pairs: list[tuple[str, str, Path | None]] = [(decoder, vision, None) for decoder, vision in PAIRS]
    if types is not None:
        matrices = (None,) if pictures is None else (None, pictures)
        pairs = [(*FLOAT, None), *((kind, "f32", matrix) for kind in types for matrix in matrices)]
    samples = {kind: [draw(kind, number) for number in range(count)] for kind in CORE}
    rows: list[dict[str, Any]] = []
    reference: dict[str, list[str]] = {}
    reference_logs: Logs = []
    print(
        f"{'decoder':<18} {'vision':<6} {'tower':<5} {'MB':>6} {'right':>7} {'as f32':>7} {'loss':>7} {'KL':>8} "
        f"{'top 1':>7}   " + "  ".join(CORE)
    )
    for decoder, vision, matrix in pairs:
        with tempfile.TemporaryDirectory() as folder:
            files = convert_checkpoint(checkpoint, folder, decoder_type=decoder, vision_type=vision, pictures=matrix)
            for arithmetic in arithmetics(decoder, vision):
                if (exact_only or types is not None) and arithmetic != "exact":
                    continue
                result = measure(Path(folder), samples, exact=arithmetic == "exact")
                answers, logs = result.pop("answers"), result.pop("logs")
                reference, reference_logs = reference or answers, reference_logs or logs
                kl, top1 = divergence(reference_logs, logs)
                label = decoder if matrix is None else f"{decoder} with matrix"
                what = {
                    "decoder": label,
                    "vision": vision,
                    "arithmetic": arithmetic,
                    "types": types_of(files.decoder),
                }
                what |= {"decoder_bytes": files.decoder.stat().st_size}
                rows.append({**what, "agreement": agreement(answers, reference), "kl": kl, "top1": top1, **result})
                _print_row(rows[-1])
    return rows


def run_files(folder: Path, count: int) -> list[dict[str, Any]]:
    """Measure files as they are in three arithmetics, the first of which is the reference."""
    samples = {kind: [draw(kind, number) for number in range(count)] for kind in CORE}
    rows: list[dict[str, Any]] = []
    reference: dict[str, list[str]] = {}
    reference_logs: Logs = []
    before = os.environ.get(VARIABLE)
    try:
        for arithmetic, kernels in (("exact", "off"), ("int8, llama.cpp's products", "off"), ("int8", "on")):
            os.environ[VARIABLE] = kernels
            result = measure(folder, samples, exact=arithmetic == "exact")
            answers, logs = result.pop("answers"), result.pop("logs")
            reference, reference_logs = reference or answers, reference_logs or logs
            kl, top1 = divergence(reference_logs, logs)
            types = {"decoder": "as it is", "vision": "as it is", "arithmetic": arithmetic}
            rows.append({**types, "agreement": agreement(answers, reference), "kl": kl, "top1": top1, **result})
            _print_row(rows[-1])
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
    return rows


def _print_row(row: dict[str, Any]) -> None:
    each = "  ".join(f"{share:>{len(kind)}.1%}" for kind, share in row["right"].items())
    print(
        f"{row['decoder']:<18} {row['vision']:<6} {row['arithmetic']:<5} {row['bytes'] / 1e6:6.1f} "
        f"{row['average']:7.2%} {row['agreement']:7.2%} {row['loss']:7.4f} {row['kl']:8.5f} "
        f"{row['top1']:7.2%}   {each}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "checkpoint", type=Path, help="demo checkpoint in the official layout, float32; or a folder of GGUF files"
    )
    parser.add_argument("--samples", type=int, default=100, help="per core skill")
    parser.add_argument("--exact", action="store_true", help="leave out the rows in int8")
    parser.add_argument("--types", nargs="+", choices=DECODER_TYPES, metavar="TYPE", help="only these decoder types")
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="with --types: also with a matrix from it")
    parser.add_argument("--plot", type=Path, help="also draw size against quality into this file (.svg or .png)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    is_files = any(options.checkpoint.glob("*.gguf"))
    if is_files:
        rows = run_files(options.checkpoint, options.samples)
        last = rows[-1]
    else:
        rows = run(
            options.checkpoint,
            options.samples,
            exact_only=options.exact,
            types=options.types,
            pictures=options.calibrate,
        )
        # The last of a pair: int8 where it was measured.
        last = {(row["decoder"], row["vision"]): row for row in rows}.get(SHIPPED, rows[-1])
    lost = rows[0]["average"] - last["average"]
    which = "last" if options.types else "shipped"
    print(f"The {which} types lose {100 * lost:.2f} points against {'exact' if is_files else 'float32'}.")
    for row in rows:
        row |= {key: round(value, 8) for key, value in row.items() if isinstance(value, float)}
    summary = {
        "scenario": "quality-files" if is_files else "quality-types" if options.types else "quality-demo",
        "samples_per_skill": options.samples,
        "rows": rows,
        "points_lost": round(100 * lost, 3),
        "version": __version__,
        "cpu": cpu_name(),
        "kernels": isa(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    if options.plot:
        plot_quality(rows, options.plot)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
