"""Items per second of `edge-runtime batch` against a loop over `Model.chat`, in turns with one loaded model.

    python benchmarks/batch_throughput.py [MODEL] [--items 96] [--size 448] [--tokens 16]

Both sides read picture files that differ, a new set for every run, so that nothing is known before. The loop asks
one after the other. The other side is what the command runs: the same reading of files, the same threads, and a line
on the disk for every answer. Answers are greedy and have the same number of tokens. Reports the seconds of each run,
and the median ratio of a loop to the batch after it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.goals import Goal, finish  # noqa: E402

PROMPT = "What is shown in this picture?"
LEAST_DEMO, LEAST_FULL = 1.8, 2.0


def make_pictures(folder: Path, number: int, size: int, seed: int) -> None:
    """Pictures of coloured noise and a few large shapes, as PNG files."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(number):
        noise = rng.integers(0, 256, (max(1, size // 16), max(1, size // 16), 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((size, size))
        x, y = (int(v) for v in rng.integers(0, size // 2, 2))
        ImageDraw.Draw(picture).rectangle((x, y, x + size // 4, y + size // 4), fill=(250, 30, 30))
        picture.save(folder / f"{i:05}.png")


def loop(model: Any, folder: Path, options: dict[str, Any]) -> float:
    """Ask about one picture after the other; returns seconds."""
    started = time.perf_counter()
    for path in sorted(folder.iterdir()):
        model.chat([{"role": "user", "content": [path, PROMPT]}], **options)
    return time.perf_counter() - started


def batch(model: Any, folder: Path, options: dict[str, Any], pool: Any) -> float:
    """Ask about all of them as the command does; returns seconds."""
    from edge_runtime.batch.answering import Answering, never
    from edge_runtime.batch.files import Files
    from edge_runtime.batch.inputs import Inputs
    from edge_runtime.batch.items import Asking
    from edge_runtime.batch.lines import line_of, read_line
    from edge_runtime.batch.output import Output
    from edge_runtime.batch.runner import Runner, pending
    from edge_runtime.batch.work import write_all

    started = time.perf_counter()
    source = Inputs(Files([str(folder)], (".png",)), Asking(PROMPT, options=options), lambda path: path, pool)
    with Output(folder.with_suffix(".jsonl"), read_line) as output:
        output.open()
        answering = Answering(model, {"decoders": pool, "gives_way": never})
        runner = Runner(pending(source, output), answering, 2 * model.activity.slots)
        write_all(runner.results(), output, line_of)
        assert output.n_answers == source.total, "an item has failed"
    return time.perf_counter() - started


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--items", type=int, default=96)
    parser.add_argument("--size", type=int, default=448, help="pixels of the square pictures")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ctx", type=int, help="context length in tokens")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    options = parser.parse_args()

    from edge_runtime import DecoderPool, Model

    asked = {"greedy": True, "max_tokens": options.tokens, "ignore_eos": True, "repetition_check": False}
    rows: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        contextlib.closing(DecoderPool()) as pool,
        Model.load(options.model, n_ctx=options.ctx, n_threads=options.threads) as model,
    ):
        pool.start()
        for number in range(-1, options.repeats):  # the first pair compiles and warms up
            folder = Path(temporary) / str(number)
            n = options.items if number >= 0 else min(options.items, 4)
            for side, seed in (("loop", 2 * number), ("batch", 2 * number + 1)):
                make_pictures(folder / side, n, options.size, seed + 1000)
            row = {"loop_s": loop(model, folder / "loop", asked)}
            row["batch_s"] = batch(model, folder / "batch", asked, pool)
            if number >= 0:
                rows.append(row)
                print(
                    f"loop {row['loop_s']:.2f} s, batch {row['batch_s']:.2f} s, "
                    f"{row['loop_s'] / row['batch_s']:.2f}x",
                    flush=True,
                )
        is_toy, name = model.is_toy, model.name
    least = LEAST_DEMO if is_toy else LEAST_FULL
    ratio = median(row["loop_s"] / row["batch_s"] for row in rows)
    per_s = {side: options.items / median(row[f"{side}_s"] for row in rows) for side in ("loop", "batch")}
    facts = {
        "model": name,
        "items": options.items,
        "size": options.size,
        "tokens": options.tokens,
        "rows": rows,
        "items_per_s": per_s,
        "ratio": ratio,
    }
    print(f"{ratio:.2f} times the throughput of a loop ({per_s['loop']:.2f} → {per_s['batch']:.2f} items/s)")
    finish(facts, [Goal("times the throughput of a loop", ratio, least, at_least=True)], options.json)


if __name__ == "__main__":
    main()
