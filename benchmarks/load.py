"""A server under load: whether it holds up, and its throughput beside llama-server's.

    python benchmarks/load.py --minutes 5 [--clients 50] [--model demo] [--json FILE]
    python benchmarks/load.py --peer LLAMA_SERVER --model FOLDER [--clients 4 8] [--requests 24] [--json FILE]

The first asks the server for a while; every client sends one question after the other, each about a new picture. The
server passes if there is no error but 429, and memory (RssAnon, less the visual tokens and features of slices that
are kept on purpose, up to 192 MB) does not grow after the first quarter; otherwise the exit code is 1. The 95th
percentile of the time to the first token is shown.

The second asks both servers the same: new pictures of 448 x 448, 16 tokens each, the same files and threads, streams
over OpenAI's API. The servers take turns, each alone in memory, and every turn starts with requests that are not
counted; the result is the sum over turns. LLAMA_SERVER is built from llama-cpp-python's source distribution: cmake
-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF, target llama-server. If its repacked weights crash the process (AMX
in a virtual machine), pass --peer-options=--no-repack.

The clients run on the same machine and take the same share of it from both sides. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
from PIL import Image

from edge_runtime.cli.info import describe_machine
from edge_runtime.store.find import find_model

SIDE = 448  # pixels: one slice, 64 visual tokens
MAX_TOKENS = 16
QUESTION = "Describe this picture in detail."
LEAST_SAMPLES, MOST_GROWTH_MB = 20, 16.0
"""Growth between the medians of the second and the last quarter; allocators of many threads fluctuate."""
START_S = 600.0
TURNS = 2


def picture(rng: random.Random) -> str:
    """A new JPEG in base64."""
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
    data = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()


@dataclass
class Tally:
    """Outcomes of requests."""

    ends: Counter[str] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    request_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Number of complete answers."""
        return self.ends["ok"]

    def facts(self) -> dict[str, Any]:
        """Fields for the result."""
        first = sorted(self.first_token_s)
        return {
            "ends": dict(self.ends),
            "seconds": round(self.seconds, 2),
            "requests_per_s": round(self.done / max(self.seconds, 1e-9), 4),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 3),
            "first_token_s": {"median": round(median(first), 3), "p95": round(percentile(first, 95), 3)}
            if first
            else None,
        }


def percentile(values: list[float], percent: int) -> float:
    """A percentile; a single value is its own."""
    return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass
class Watch:
    """One request in flight."""

    tally: Tally
    started: float = field(default_factory=time.perf_counter)
    has_first: bool = False

    def note_text(self, text: str | None) -> None:
        """Record the time to the first token, once."""
        if text and not self.has_first:
            self.has_first = True
            self.tally.first_token_s.append(time.perf_counter() - self.started)


Ask = Callable[[httpx2.AsyncClient, random.Random, Tally], Awaitable[None]]


async def ask_ollama(client: httpx2.AsyncClient, rng: random.Random, tally: Tally, *, model: str) -> None:
    """Ask one question over Ollama's API."""
    message = {"role": "user", "content": QUESTION, "images": [picture(rng)]}
    body = {"model": model, "messages": [message], "options": {"num_predict": MAX_TOKENS}}
    watch = Watch(tally)
    async for line in _lines(client, "/api/chat", body, watch):
        piece = json.loads(line)
        if "error" in piece:
            raise ConnectionError(piece["error"])
        watch.note_text(piece["message"]["content"])
        if piece.get("done"):
            tally.tokens += piece.get("eval_count", 0)


async def ask_openai(client: httpx2.AsyncClient, rng: random.Random, tally: Tally, *, model: str) -> None:
    """Ask one question over OpenAI's API."""
    url = {"url": f"data:image/jpeg;base64,{picture(rng)}"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": QUESTION}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    watch = Watch(tally)
    async for line in _lines(client, "/v1/chat/completions", body, watch):
        if not line.startswith("data: {"):
            continue
        piece = json.loads(line[6:])
        if "error" in piece:
            raise ConnectionError(piece["error"])
        for choice in piece.get("choices", []):
            watch.note_text(choice["delta"].get("content") or choice["delta"].get("reasoning_content"))
        if piece.get("usage"):
            tally.tokens += piece["usage"]["completion_tokens"]


async def _lines(client: httpx2.AsyncClient, path: str, body: dict[str, Any], watch: Watch) -> AsyncIterator[str]:
    tally = watch.tally
    async with client.stream("POST", path, json=body) as reply:
        if reply.status_code != 200:
            tally.ends[str(reply.status_code)] += 1
            await reply.aread()
            await asyncio.sleep(float(reply.headers.get("retry-after", 0)))
            return
        async for line in reply.aiter_lines():
            yield line
    tally.ends["ok"] += 1
    tally.request_s.append(time.perf_counter() - watch.started)


async def ask_many(url: str, ask: Ask, clients: int, goes_on: Callable[[], bool], tally: Tally, seed: int) -> None:
    """Let clients ask one question after the other while `goes_on` is true; each finishes its last one."""
    limits = httpx2.Limits(max_connections=clients + 1, max_keepalive_connections=clients + 1)

    async def one(number: int, client: httpx2.AsyncClient) -> None:
        rng = random.Random(seed * 1000 + number)
        while goes_on():
            try:
                await ask(client, rng, tally)
            except (httpx2.HTTPError, ConnectionError, ValueError, KeyError) as error:
                tally.ends[f"{type(error).__name__}: {str(error)[:80]}"] += 1

    started = time.perf_counter()
    async with httpx2.AsyncClient(base_url=url, timeout=3600, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(one(number, client) for number in range(clients)))
    tally.seconds += time.perf_counter() - started


# --- servers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(command: list[str], url: str | None) -> Iterator[str]:
    """Run a server as a process of its own; yield its address once it answers.

    Parameters
    ----------
    url : its address; None reads it from the first line it prints.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said: list[str] = []
    starts_by_itself = url is None
    try:
        end = time.monotonic() + START_S
        if url is None:
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"https?://[\w.:\[\]]+", line):
                    url = found[0]
                    break
        else:
            drain(process, said)
        while url is None or not _is_well(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"The server did not start: {' '.join(command)}\n{''.join(said)[-2000:]}")
            time.sleep(0.2)
        if starts_by_itself:
            drain(process, said)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def drain(process: subprocess.Popen[str], said: list[str]) -> None:
    """Read a server's output, or it would block when the pipe is full; the last lines say why it ended."""

    def read() -> None:
        with contextlib.suppress(ValueError):  # closed at the end
            for line in process.stdout or ():
                said.append(line)
                del said[:-50]

    threading.Thread(target=read, daemon=True).start()


def _is_well(url: str) -> bool:
    try:
        return httpx2.get(url + "/health", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def ours(options: argparse.Namespace) -> list[str]:
    """Command line of our server."""
    command = [sys.executable, "-m", "edge_runtime", "serve", "--port", "0", "-m", options.model, "--grace", "5"]
    command += ["--no-cache-dir"]  # results of an earlier run must not help
    command += ["--ctx", str(options.ctx)] if options.peer else []
    return command + (["--threads", str(options.threads)] if options.threads else [])


def peers(options: argparse.Namespace, clients: int, port: int) -> list[str]:
    """Command line of llama-server with the same files and threads, and as many slots as clients."""
    paths = find_model(options.model)
    threads = str(options.threads or describe_machine()["threads"])
    return [
        *(str(options.peer), "--model", str(paths.decoder), "--mmproj", str(paths.mmproj)),
        *("--port", str(port), "--host", "127.0.0.1", "--parallel", str(clients), "--ctx-size", str(options.ctx)),
        *("--threads", threads, "--threads-batch", threads, "--jinja", "--no-warmup"),
        *shlex.split(options.peer_options),
    ]


def loaded_model(url: str) -> str:
    """The model that our server was started with; it lists others, too, the demo first."""
    (model,) = httpx2.get(url + "/api/ps", timeout=60, trust_env=False).json()["models"]
    return str(model["name"])


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


# --- the two measurements ------------------------------------------------------------------------------------------


def hold(options: argparse.Namespace) -> dict[str, Any]:
    """Ask our server for a while.

    Returns
    -------
    facts : `passed` says whether the server passed.
    """
    tally = Tally()
    memory: list[float] = []
    kept: list[float] = []
    clients = options.clients[0]
    with running(ours(options), None) as url:
        model = loaded_model(url)

        async def ask(client: httpx2.AsyncClient, rng: random.Random, tally: Tally) -> None:
            await ask_ollama(client, rng, tally, model=model)

        # The first picture may compile kernels, which takes minutes on a busy machine.
        once = iter([True])
        asyncio.run(ask_many(url, ask, 1, lambda: next(once, False), Tally(), options.seed))
        end = time.monotonic() + 60 * options.minutes

        async def watch() -> None:
            async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                while time.monotonic() < end:
                    text = (await client.get("/metrics")).text
                    memory.append(_megabytes(text, "edge_runtime_anonymous_memory_bytes"))
                    kept.append(_megabytes(text, "edge_runtime_picture_cache_bytes"))
                    if len(memory) % 15 == 1:
                        print(
                            f"{memory[-1]:7.1f} MB, {kept[-1]:.1f} of them visual tokens; {dict(tally.ends)}",
                            file=sys.stderr,
                            flush=True,
                        )
                    await asyncio.sleep(min(1.0, 60 * options.minutes / LEAST_SAMPLES))

        async def both() -> None:
            await asyncio.gather(
                watch(), ask_many(url, ask, clients, lambda: time.monotonic() < end, tally, options.seed)
            )

        asyncio.run(both())
    quarter = max(1, len(memory) // 4)
    # Tokens and features are kept up to a limit; even with only new pictures it takes a while to reach.
    others_mb = [total - tokens for total, tokens in zip(memory, kept, strict=True)]
    growth = median(others_mb[-quarter:]) - median(others_mb[quarter : 2 * quarter])
    others = {name: count for name, count in tally.ends.items() if name not in ("ok", "429")}
    return {
        "clients": clients,
        "model": options.model,
        **tally.facts(),
        "rss_anon_mb": [round(value, 1) for value in memory],
        "kept_visual_tokens_mb": [round(value, 1) for value in kept],
        "growth_mb": round(growth, 2),
        "other_errors": others,
        "passed": not others and growth <= MOST_GROWTH_MB and tally.done > 0,
    }


def _megabytes(text: str, name: str) -> float:
    """Sum of a metric over its labels."""
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)", text, re.MULTILINE)
    return sum(map(float, found)) / 2**20


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Ask both servers the same, in turns."""
    found: dict[str, Any] = {}
    for clients in options.clients:
        tallies = {"ours": Tally(), "llama-server": Tally()}
        for turn in range(TURNS):
            for side in [*tallies] if turn % 2 == 0 else [*tallies][::-1]:
                port = free_port()
                is_ours = side == "ours"
                command = ours(options) if is_ours else peers(options, clients, port)
                with running(command, None if is_ours else f"http://127.0.0.1:{port}") as url:
                    asyncio.run(
                        _ask_side(url, clients, options.requests, tallies[side], options.seed + turn, is_ours=is_ours)
                    )
                print(f"{clients} clients, {side}: {tallies[side].facts()}", file=sys.stderr, flush=True)
        facts = {side: tally.facts() for side, tally in tallies.items()}
        ratio = facts["ours"]["tokens_per_s"] / max(facts["llama-server"]["tokens_per_s"], 1e-9)
        requests = facts["ours"]["requests_per_s"] / max(facts["llama-server"]["requests_per_s"], 1e-9)
        found[str(clients)] = {**facts, "ratio_of_requests": round(requests, 3), "ratio_of_tokens": round(ratio, 3)}
    return {
        "model": Path(options.model).name,
        "ctx": options.ctx,
        "peer_options": options.peer_options,
        "clients": found,
    }


async def _ask_side(url: str, clients: int, requests: int, tally: Tally, seed: int, *, is_ours: bool) -> None:
    model = loaded_model(url) if is_ours else "the only one"

    async def ask(client: httpx2.AsyncClient, rng: random.Random, tally: Tally) -> None:
        await ask_openai(client, rng, tally, model=model)

    left = iter(range(clients))
    await ask_many(url, ask, clients, lambda: next(left, None) is not None, Tally(), -1 - seed)  # warm-up
    left = iter(range(requests))
    await ask_many(url, ask, clients, lambda: next(left, None) is not None, tally, seed)


def main() -> None:
    """Arguments in, JSON out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--peer", type=Path, help="llama-server")
    parser.add_argument("--peer-options", default="", help="further options of llama-server, such as --no-repack")
    parser.add_argument("--requests", type=int, default=24, help="of each turn, beside the peer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.clients = options.clients or ([4, 8] if options.peer else [50])
    machine = {name: value for name, value in describe_machine().items() if name != "kernel cache"}  # a path
    scenario = "load_peer" if options.peer else "load"
    facts = {"scenario": scenario, "machine": machine, **(compare(options) if options.peer else hold(options))}
    text = json.dumps(facts)
    if options.json:
        options.json.write_text(text + "\n", "utf-8")
    print(text)
    sys.exit(0 if facts.get("passed", True) else 1)


if __name__ == "__main__":
    main()
