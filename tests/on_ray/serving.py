"""The deployment of Ray Serve: OpenAI's client asks it while a replica dies. Run by `test_ray` in its own process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import psutil
import pytest
import ray
from ray import serve

from edge_runtime.ray.app import Arguments, app
from on_ray.cluster import two_nodes
from server.asked import ANSWER, HELLO, QUESTION

PORT = 18423


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """OpenAI's client of a deployment with a replica on each of two nodes."""
    with two_nodes() as (cluster, _):
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        arguments = Arguments(min_replicas=2, max_replicas=2, load={"n_ctx": 4096})
        serve.run(app(arguments), route_prefix="/")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=5)
        serve.shutdown()


def replicas() -> list[psutil.Process]:
    """Processes that serve."""
    return [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(p.cmdline())]


def test_answers(client: openai.OpenAI):
    for messages, expected in ((HELLO, ANSWER), (QUESTION, "CAFE")):
        reply = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=60)
        assert reply.choices[0].message.content == expected
    pieces = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60, stream=True)
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == ANSWER
    assert len([text for text in texts if text]) > 3


def test_replicas_die(client: openai.OpenAI):
    """Every request is answered, and there are two replicas again."""
    first = replicas()
    assert len(first) == 2
    for number in range(30):
        if number == 5:
            first[0].kill()
        reply = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_tokens=60)
        assert reply.choices[0].message.content == ANSWER
    ends = time.monotonic() + 60
    while len(replicas()) < 2:
        assert time.monotonic() < ends, "no replica has taken the place of the dead one"
        time.sleep(0.5)
    assert first[0].pid not in {process.pid for process in replicas()}
