"""Clients with pictures on a server that another client attacks: what the others notice.

    python benchmarks/attacked.py --minutes 5 [--clients 50] [--attackers 8] [--json FILE]

The load of `load.py` on one server, for a while in peace and for as long under attack. The attacker has an address of
its own (127.0.0.2) and sends `--attackers` requests at a time: pages and pictures that take for ever to decode, some
abandoned after a second, pictures and animations as large as allowed, damaged files, megabytes of text, deep JSON,
schemas that are hard to compile, heads and bodies that never end.

The server passes if no client sees an error, in peace or under attack, and the 95th percentile of the time to the
first token at most doubles; otherwise the exit code is 1. The last line is one JSON object.
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
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load import Tally, ask_many, ask_ollama, loaded_model, ours, percentile, running
from edge_runtime.cli.info import describe_machine

ADDRESS = "127.0.0.2"
MOST_SLOWER = 2.0
PATIENCE_S = 20.0
"""Time after which the attacker gives up and tries the next attack."""
Attack = Callable[[httpx2.AsyncClient, random.Random], Awaitable[int]]
"""Sends something, returns the status of the reply."""


def endless_pdf() -> bytes:
    """A small PDF whose forms draw each other, ten deep and twenty wide."""
    form = "<</Type/XObject/Subtype/Form/BBox[0 0 99 99]/Resources{}/Length {}>>stream\n{}\nendstream"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>",
        "<</Length 5>>stream\n/F Do\nendstream",
    ]
    for i in range(10):
        body = "0 0 9 9 re f" if i == 9 else " ".join(["/F Do"] * 20)
        objects.append(form.format("<<>>" if i == 9 else f"<</XObject<</F {6 + i} 0 R>>>>", len(body), body))
    out = "%PDF-1.7\n" + "".join(f"{i} 0 obj\n{text}\nendobj\n" for i, text in enumerate(objects, 1))
    return (out + f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\n%%EOF").encode()


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated four hundred times."""
    data = io.BytesIO()
    Image.new("L", (8000, 7900)).save(data, "JPEG", progressive=True, quality=10)
    whole = data.getvalue()
    last = [match.start() for match in re.finditer(b"\xff\xda", whole)][-1]
    return whole[:-2] + whole[last:-2] * 400 + b"\xff\xd9"


def many_frames() -> bytes:
    """A GIF of twenty thousand frames of sixteen million pixels."""
    frame = b"\x21\xf9\x04\0\1\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x4c\1\0"
    return b"GIF89a\xa0\x0f\xa0\x0f\x80\0\0\0\0\0\xff\xff\xff" + frame * 20_000 + b";"


def largest(kind: str) -> bytes:
    """A picture of one colour with as many pixels as allowed."""
    data = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(data, kind)
    return data.getvalue()


def made() -> dict[str, bytes]:
    """The attackers' files, made once."""
    return {
        "endless page": endless_pdf(),
        "many scans": many_scans(),
        "many frames": many_frames(),
        "largest jpeg": largest("JPEG"),
        "largest png": largest("PNG"),
        "bomb": b"%PDF-1.7\n" + zlib.compress(bytes(50 << 20), 9),
    }


def _chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": [*parts]}], "max_tokens": 2, **more}


def _file(data: bytes, kind: str = "image_url") -> dict[str, Any]:
    uri = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
    return {"type": kind, kind: {"url": uri}}


async def _post(client: httpx2.AsyncClient, body: Any, timeout_s: float = PATIENCE_S) -> int:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = await client.post(
        "/v1/chat/completions", content=data, headers={"content-type": "application/json"}, timeout=timeout_s
    )
    return int(reply.status_code)


def attacks(files: dict[str, bytes], host: str, port: int) -> dict[str, Attack]:
    """All attacks, by name."""

    def sent(name: str, kind: str = "image_url", timeout_s: float = PATIENCE_S) -> Attack:
        body = json.dumps(_chat(_file(files[name], kind))).encode()

        async def attack(client: httpx2.AsyncClient, rng: random.Random) -> int:
            return await _post(client, body, timeout_s)

        return attack

    async def damaged(client: httpx2.AsyncClient, rng: random.Random) -> int:
        data = io.BytesIO()
        Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).save(data, rng.choice(["JPEG", "PNG", "WEBP"]))
        broken = bytearray(data.getvalue())
        for _ in range(5):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return await _post(client, _chat(_file(bytes(broken))))

    async def much_text(client: httpx2.AsyncClient, rng: random.Random) -> int:
        return await _post(client, _chat({"type": "text", "text": "word " * 600_000}))

    async def deep(client: httpx2.AsyncClient, rng: random.Random) -> int:
        return await _post(client, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}")

    async def schema(client: httpx2.AsyncClient, rng: random.Random) -> int:
        pattern = "((a{1,200}b{1,200}){1,200}c{1,200}){1,200}"
        form = {"type": "object", "properties": {f"k{i}": {"type": "string", "pattern": pattern} for i in range(14)}}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
        return await _post(client, _chat({"type": "text", "text": "?"}, response_format=wanted))

    async def half(client: httpx2.AsyncClient, rng: random.Random) -> int:
        """A head or a body that never ends."""
        reader, writer = await asyncio.open_connection(host, port, local_addr=(ADDRESS, 0))
        head = b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        writer.write(head + (b"Content-Length: 100000\r\n\r\n{" if rng.random() < 0.5 else b"X: "))
        with contextlib.suppress(TimeoutError, OSError):
            await asyncio.wait_for(reader.read(1000), 5)
        writer.close()
        return 0

    return {
        "a page that never ends": sent("endless page"),
        "one that is left": sent("endless page", timeout_s=1.0),
        "a JPEG of many scans": sent("many scans"),
        "an animation of many frames": sent("many frames", "video_url"),
        "the largest JPEG": sent("largest jpeg"),
        "the largest PNG": sent("largest png"),
        "no PDF": sent("bomb"),
        "damaged files": damaged,
        "three megabytes of text": much_text,
        "deep JSON": deep,
        "a hard schema": schema,
        "what never ends": half,
    }


async def _attack(
    url: str, tried: dict[str, Attack], n: int, goes_on: Callable[[], bool], seen: Counter[str]
) -> None:
    """Run one client's attacks, several at a time."""
    transport = httpx2.AsyncHTTPTransport(local_address=ADDRESS, limits=httpx2.Limits(max_connections=n))

    async def one(number: int, client: httpx2.AsyncClient) -> None:
        rng, names = random.Random(number), [*tried]
        while goes_on():
            name = rng.choice(names)
            try:
                status = str(await tried[name](client, rng))
            except (httpx2.HTTPError, OSError) as error:
                status = type(error).__name__
            seen[f"{name}: {status}"] += 1

    async with httpx2.AsyncClient(base_url=url, transport=transport, trust_env=False) as client:
        tasks = [asyncio.create_task(one(number, client)) for number in range(n)]
        while goes_on():
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the load in peace, then under attack.

    Returns
    -------
    facts : `passed` says whether the server passed.
    """
    files = made()
    peace, war, seen = Tally(), Tally(), Counter[str]()
    with running(ours(options), None) as url:
        model = loaded_model(url)
        host, port = url.removeprefix("http://").split(":")
        tried = attacks(files, host, int(port))

        async def ask(client: httpx2.AsyncClient, rng: random.Random, tally: Tally) -> None:
            await ask_ollama(client, rng, tally, model=model)

        async def both(tally: Tally, seed: int, n_attackers: int) -> None:
            end = time.monotonic() + 60 * options.minutes

            def goes_on() -> bool:
                return time.monotonic() < end

            await asyncio.gather(
                ask_many(url, ask, options.clients[0], goes_on, tally, seed),
                _attack(url, tried, n_attackers, goes_on, seen),
            )

        for tally, seed, n_attackers in ((peace, 1, 0), (war, 2, options.attackers)):
            asyncio.run(both(tally, seed, n_attackers))
            print(json.dumps(tally.facts()), file=sys.stderr, flush=True)
    slower = percentile(war.first_token_s, 95) / percentile(peace.first_token_s, 95)
    errors = {name: n for tally in (peace, war) for name, n in tally.ends.items() if name != "ok"}
    return {
        "clients": options.clients[0],
        "attackers": options.attackers,
        "minutes": options.minutes,
        "peace": peace.facts(),
        "attacked": war.facts(),
        "p95_ratio": round(slower, 2),
        "errors": errors,
        "attacks": dict(sorted(seen.items())),
        "passed": not errors and slower <= MOST_SLOWER and peace.done > 0 and war.done > 0,
    }


def main() -> None:
    """Arguments in, JSON out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, nargs=1, default=[50])
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(peer=None)
    options = parser.parse_args()
    machine = {name: value for name, value in describe_machine().items() if name != "kernel cache"}  # a path
    facts = {"scenario": "attacked", "machine": machine, **measure(options)}
    text = json.dumps(facts)
    if options.json:
        options.json.write_text(text + "\n", "utf-8")
    print(text)
    sys.exit(0 if facts["passed"] else 1)


if __name__ == "__main__":
    main()
