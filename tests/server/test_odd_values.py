"""Odd values in every field of every API, streams included: none is a fault of the server, and nobody else notices.

The short form takes a part of the pairs, the same ones every time; the long one, marked slow, many more.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.attacking import Serve, is_idle, wait_until
from server.conftest import Served
from server.odd_values import ROUTES, VALUES, Odd, requests

INSIDE = ("Something went wrong", "internal_error", "Traceback", "There was an error parsing")
"""What replies hold when the server did not know what to say, streams under a status of 200 included."""


def all_pairs(served: Served) -> list[Odd]:
    """Every value in every field, those that the description of the API names and no body here has included."""
    described = served.app.openapi()
    found = []
    for route in ROUTES:
        operation = described["paths"][route.path][route.method.lower()]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        fields = [*described["components"]["schemas"][name]["properties"]]
        found += requests(route, fields)
    return found


def chosen(pairs: list[Odd], n: int) -> list[Odd]:
    """So many of them, from everywhere, whatever is added to the table."""
    return sorted(pairs, key=lambda odd: hashlib.sha256(str(odd).encode()).digest())[:n]


@contextmanager
def neighbour(served: Served) -> Iterator[list[float]]:
    """Another client, who asks the same all the time; times of its answers in seconds."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "stream": False, "think": False}
    ended, times, faults = threading.Event(), [], []
    with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
        first = client.post("/api/chat", json=body).json()["message"]

        def ask() -> None:
            while not ended.wait(0.3):
                started = time.monotonic()
                reply = client.post("/api/chat", json=body)
                times.append(time.monotonic() - started)
                if reply.status_code != 200 or reply.json()["message"] != first:
                    faults.append(reply.text)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield times
        finally:
            ended.set()
            thread.join()
    assert times
    assert not faults, faults[:3]


def asked(client: httpx.Client, odd: Odd) -> tuple[int, str]:
    """Status of the reply, and what it says."""
    reply = client.request(odd.route.method, odd.route.path, content=odd.body)
    return reply.status_code, reply.text


def fault_of(odd: Odd, status: int, text: str) -> str | None:
    """What is wrong with a reply."""
    if status >= 500 or any(word in text for word in INSIDE):
        return f"{odd}: {status} {text[:300]}"
    if status >= 400 and len(text) < 20 and odd.route.method != "HEAD":
        return f"{odd}: {status} says only {text!r}"
    return None


def tried(served: Served, pairs: list[Odd]) -> tuple[Counter[int], list[str]]:
    """Send them all; returns how many had which status, and the faults."""
    statuses: Counter[int] = Counter()
    faults = []
    with neighbour(served) as times, httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
        for odd in pairs:
            try:
                status, text = asked(client, odd)
            except httpx.HTTPError as error:
                faults.append(f"{odd}: {error!r}")
                continue
            statuses[status] += 1
            if (fault := fault_of(odd, status, text)) is not None:
                faults.append(fault)
    assert max(times) < 30, "the neighbour waited"
    wait_until(lambda: is_idle(served), 60)
    return statuses, faults


def check(served: Served, pairs: list[Odd]) -> None:
    """Send them all, and hold what comes back to what is promised."""
    statuses, faults = tried(served, pairs)
    print(f"{len(pairs)} pairs of {len(VALUES)} values: {dict(sorted(statuses.items()))}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:20]])
    assert statuses[400] > len(pairs) / 4  # they are odd


SETTINGS: dict[str, Any] = {"models": ("demo",), "max_tokens": 8, "max_answers": 2, "request_timeout_s": 60.0}


def test_odd_values(serve: Serve):
    served = serve(**SETTINGS)
    check(served, chosen(all_pairs(served), 600))


@pytest.mark.slow
def test_more_odd_values(serve: Serve):
    served = serve(**SETTINGS)
    check(served, chosen(all_pairs(served), 1500)[600:])
