"""Many short requests with random cancels, errors and disconnects: whether anything leaks or is lost or mixed up.

    python benchmarks/soak.py [--requests 2000] [--seed 0] [--cache] [--json FILE]

It uses the tests' tiny model in exact arithmetic, where an answer has the same bits alone and among others. Every
answer is compared with the one the same question got alone. Up to `IN_FLIGHT` requests run at once; some are
cancelled at a random moment, also in encoding and prefill, some are abandoned by their readers, some fail: broken
pictures, prompts that are too long, an engine that raises. Few visual tokens are cached, so that pictures are encoded
again and again. With --cache, visual tokens and conversation prefixes are kept in a small folder, so that entries
come and go.

Now and then it waits for all requests and prints the anonymous memory (RssAnon). The last line is one JSON object.
The exit code is 1 when an answer was wrong or lost, a sequence was not freed, or memory grew by more than
`MOST_GROWTH_MB` after the first `WARM_UP` requests.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from PIL import Image

from edge_converters import convert_checkpoint
from edge_runtime import EdgeRuntimeError, Model, ModelFileError
from edge_runtime.answers import AnswerStream
from edge_runtime.cache.visual_tokens import VisualTokenCache
from edge_runtime.engine import scheduler
from edge_runtime.inputs.messages import Message

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
IN_FLIGHT = 12
REST_S = 0.4  # time for the engine to give memory back
WARM_UP = 200
SAMPLE_EVERY = 25  # requests
MOST_GROWTH_MB = 4.0
"""Growth between the medians of both halves. Allocators round; 2,000 requests that each leak 4 KB would show."""
QUESTIONS = ("What is it?", "Why?", "Say something.", "Which colour is the sky?", "Count to three.", "Who are you?")
FAILING = "made to fail"
REMEMBERED = 4  # groups of visual tokens


@dataclass
class Soak:
    """Counts and samples of a run."""

    model: Model
    rng: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss_mb: list[tuple[int, float]] = field(default_factory=list)
    expected: dict[tuple[int, str], str] = field(default_factory=dict)
    pictures: list[Image.Image] = field(default_factory=list)

    def ask(self, picture: int, question: str) -> AnswerStream:
        """Start a request about one of the pictures (-1: none)."""
        content: list[Any] = [question] if picture < 0 else [self.pictures[picture], question]
        return self.model.chat(
            [{"role": "user", "content": content}], stream=True, greedy=True, max_tokens=self.n_tokens(question)
        )

    @staticmethod
    def n_tokens(question: str) -> int:
        """Length of the answer; lengths differ, so that requests end at different times."""
        return 3 + len(question) % 7


def pictures_of(n: int) -> list[Image.Image]:
    """Different small pictures, of several shapes."""
    found = []
    for number in range(n):
        name = ("tiny", "square", "edge")[number % 3]
        with Image.open(FIXTURES / "images" / f"{name}.png") as opened:
            picture = opened.convert("RGB")
        picture.putpixel((number % picture.width, number % picture.height), (number, 255 - number, 7))
        found.append(picture)
    return found


def failing_requests(model: Model) -> list[Callable[[], Any]]:
    """Requests that are refused or fail, each at a different place."""
    return [
        lambda: model.chat([{"role": "user", "content": [b"no picture", "What is it?"]}], stream=True),
        lambda: model.chat("word " * 5000, stream=True),
        lambda: model.chat([{"role": "nobody", "content": "Hello"}], stream=True),
        lambda: model.chat("Hello", adapter="none", stream=True),
        lambda: model.chat([Message("user", (FAILING,))], stream=True, greedy=True, max_tokens=2),
    ]


def make_failures() -> None:
    """Make the engine raise at the last token of marked prompts, as damaged weights would."""
    advance = scheduler.advance

    def failing(task: Any, *more: Any) -> Any:
        if FAILING in task.request.prompt.text:
            raise ModelFileError(FAILING)
        return advance(task, *more)

    scheduler.advance = failing


def rss_anon_mb() -> float:
    """Anonymous memory of this process; its whole memory where the system does not separate them."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return psutil.Process().memory_info().rss / 2**20


def run(soak: Soak, n_requests: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the requests.

    Returns
    -------
    facts : the result, for the last line.
    """
    model, rng, started = soak.model, soak.rng, time.perf_counter()
    make_failures()
    failures = failing_requests(model)
    running: list[tuple[tuple[int, str], AnswerStream]] = []
    for number in range(n_requests):
        if rng.random() < 0.1:
            _fail(soak, rng.choice(failures))
        else:
            key = (rng.randrange(-1, len(soak.pictures)), rng.choice(QUESTIONS))
            running.append((key, soak.ask(*key)))
            if rng.random() < 0.2:
                threading.Timer(rng.random() * 0.1, running[-1][1].cancel).start()
        if running and rng.random() < 0.1:
            running.pop(rng.randrange(len(running)))  # its reader stops reading
            soak.ends["forgotten"] += 1
        while len(running) >= IN_FLIGHT:
            _finish(soak, *running.pop(rng.randrange(len(running))))
        if number % SAMPLE_EVERY == SAMPLE_EVERY - 1:
            while running:
                _finish(soak, *running.pop())
            _wait_until_free(model)
            gc.collect()  # exceptions and their frames, which Python would free at some later time
            time.sleep(REST_S)
            soak.rss_mb.append((number + 1, rss_anon_mb()))
            say(f"{number + 1:>6} requests  {soak.rss_mb[-1][1]:8.1f} MB  {dict(soak.ends)}")
    while running:
        _finish(soak, *running.pop())
    free = _wait_until_free(model)
    settled = [mb for number, mb in soak.rss_mb if number > WARM_UP]
    half = len(settled) // 2
    growth = median(settled[half:]) - median(settled[:half]) if half else 0.0
    return {
        "scenario": "soak",
        "requests": n_requests,
        "ends": dict(soak.ends),
        "wrong": soak.wrong[:10],
        "sequences_free": free,
        "growth_mb": round(growth, 2),
        "rss_anon_mb": [[number, round(mb, 1)] for number, mb in soak.rss_mb],
        "ours_s": {"request": round((time.perf_counter() - started) / n_requests, 4)},
        "peers_s": {},
        "passed": not soak.wrong and free and growth <= MOST_GROWTH_MB,
    }


def _finish(soak: Soak, key: tuple[int, str], stream: AnswerStream) -> None:
    """Read an answer to its end, and compare it with the one given alone."""
    answer = stream.result()
    soak.ends[answer.finish_reason] += 1
    expected = soak.expected[key]
    is_right = expected.startswith(str(answer)) if answer.finish_reason == "cancelled" else str(answer) == expected
    if not is_right:
        soak.wrong.append(f"{key}: {str(answer)!r} instead of {expected!r}")


def _fail(soak: Soak, request: Callable[[], AnswerStream]) -> None:
    try:
        request().result()
    except EdgeRuntimeError as error:
        soak.ends[type(error).__name__] += 1
    else:
        soak.wrong.append("a request that had to fail did not")


def _wait_until_free(model: Model, patience_s: float = 30.0) -> bool:
    scheduler, started = model.engine.scheduler, time.perf_counter()
    while scheduler.n_tasks or sorted(scheduler.sequences.idle) != list(range(model.engine.decoder.n_sequences)):
        if time.perf_counter() - started > patience_s:
            return False
        time.sleep(0.02)
    return True


def prepare(model: Model, seed: int, n_pictures: int = 9) -> Soak:
    """Ask every question alone, before the run."""
    soak = Soak(model, random.Random(seed), pictures=pictures_of(n_pictures))
    for picture in range(-1, n_pictures):
        for question in QUESTIONS:
            soak.expected[picture, question] = str(soak.ask(picture, question).result())
    scheduler, n_bytes = model.engine.scheduler, 4 * model.engine.encoder.n_queries * model.engine.encoder.hidden
    scheduler.encoding.visual_tokens = VisualTokenCache(REMEMBERED * n_bytes, scheduler.encoding.visual_tokens._saved)
    return soak


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", action="store_true", help="keep entries on disk meanwhile")
    parser.add_argument("--json", type=Path, help="write the last line to this file too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(FIXTURES / "checkpoint", Path(folder), decoder_type="f32", vision_type="f32")
        cache = Path(folder) / "cache" if arguments.cache else None
        with Model.load(folder, exact=True, n_ctx=2048, cache_dir=cache, cache_limit=1 << 20) as model:
            facts = run(prepare(model, arguments.seed), arguments.requests)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(facts) + "\n")
    print(json.dumps(facts))
    return 0 if facts["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
