"""LiteLLM's proxy by the configuration of deploy/, in front of two servers, one of which is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from server.asked import ANSWER, HELLO, QUESTION
from server.test_serve_command import process

ROOT = Path(__file__).parents[2]
LITELLM = ROOT / "build" / "litellm" / "bin" / "litellm"
N_REQUESTS, DIES_AT = 24, 8


def free_port() -> int:
    """A port on the loopback that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def proxy(folder: Path, *servers: str) -> Iterator[openai.OpenAI]:
    """Run the proxy; yields a client that tries nothing again by itself."""
    port, key = free_port(), f"sk-{secrets.token_hex(16)}"
    environment = {
        **os.environ,
        **{f"EDGE_RUNTIME_{number}": f"{url}/v1" for number, url in enumerate(servers, 1)},
        "EDGE_RUNTIME_API_KEY": "none",
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_PROXY": "127.0.0.1",
    }
    command = [
        str(LITELLM),
        "--config",
        str(ROOT / "deploy" / "litellm.yaml"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = folder / "proxy.log"
    with log.open("w") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said) as child:
        try:
            address = f"http://127.0.0.1:{port}"
            ends = time.monotonic() + 120
            while not _answers(address):
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(0.3)
            client = httpx.Client(trust_env=False, timeout=120)
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=client) as asked:
                yield asked
        finally:
            child.kill()


def _answers(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/health/readiness", trust_env=False).status_code == 200
    return False


@pytest.mark.slow
@pytest.mark.skipif(not LITELLM.exists(), reason="needs `make litellm`")
def test_one_of_two_servers_dies(tmp_path):
    stores = tmp_path / "one", tmp_path / "two"
    with (
        process(stores[0], "-m", "demo") as (first, one),
        process(stores[1], "-m", "demo") as (_, two),
        proxy(tmp_path, one, two) as client,
    ):
        for messages, expected in ((HELLO, ANSWER), (QUESTION, "CAFE")):
            reply = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=60)
            assert reply.choices[0].message.content == expected
        pieces = client.chat.completions.create(
            model="demo", messages=HELLO, temperature=0, max_tokens=60, stream=True
        )
        texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(texts) == ANSWER
        with ThreadPoolExecutor(4) as threads:
            assert {*threads.map(hello, [client] * N_REQUESTS)} == {ANSWER}
            assert min(_requests(one), _requests(two)) > 1, "the least busy of two gets the next request"
            waiting = [threads.submit(hello, client) for _ in range(N_REQUESTS)]
            waiting[DIES_AT].result()
            first.kill()
            assert [answer.result() for answer in waiting] == [ANSWER] * N_REQUESTS


def hello(client: openai.OpenAI) -> str | None:
    """Ask the proxy who it is."""
    reply = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
    return reply.choices[0].message.content


def _requests(url: str) -> float:
    """Calls that a server has answered."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("edge_runtime_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
