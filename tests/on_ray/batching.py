"""Pictures through a cluster whose second node dies, and through one that is started for it. Run by `test_ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from PIL import Image, ImageDraw, ImageFont

from edge_runtime import Answer, Model
from edge_runtime.batch.items import Failure, Item
from edge_runtime.errors import BackendUnavailable, MessageError
from edge_runtime.ray.batch import answers
from edge_runtime.ray.placing import Chosen
from on_ray.cluster import two_nodes

N = 60
SURE = -0.2
"""Logarithm of the least likely token's probability."""
CHOSEN = Chosen(load={"n_ctx": 4096})
NEVER = threading.Event()


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """One about each of different pictures of words, of which the demo is sure.

    Where two tokens are as likely as each other, its answer depends on the company in which it is computed.
    """
    folder = tmp_path_factory.mktemp("pictures")
    options = {"temperature": 0.0, "max_tokens": 8}
    signs = (_sign(folder, i) for i in range(2 * N))
    asked = [[{"role": "user", "content": [sign.read_bytes(), "What does it say?"]}] for sign in signs]
    with Model.load("demo", n_ctx=4096) as model:
        sure = [
            messages
            for messages in asked
            if min(token.logprob for token in model.chat(messages, logprobs=True, **options).logprobs or ()) > SURE
        ]
    assert len(sure) >= N
    return [Item(id=str(i), about={}, messages=messages, options=options) for i, messages in enumerate(sure[:N])]


def _sign(folder: Path, number: int) -> Path:
    picture = Image.new("RGB", (120 + number, 90), (250, 250, 250))
    word = "".join("ABCDEFGH"[number // 8**place % 8] for place in range(3))
    ImageDraw.Draw(picture).text((9 + number % 17, 12), word, (20, 20, 20), ImageFont.load_default(40))
    path = folder / f"{number}.png"
    picture.save(path)
    return path


@pytest.fixture(scope="module")
def right(items: list[Item]) -> list[str]:
    """What this process answers."""
    with Model.load("demo", n_ctx=4096) as model:
        return [str(model.chat(item.messages, **item.options)) for item in items]


def test_a_node_dies(items, right):
    with two_nodes() as (cluster, second):
        found: dict[str, str] = {}
        for pair in answers(cluster.address, CHOSEN, items, NEVER):
            if pair is None:
                continue
            item, answer = pair
            assert isinstance(answer, Answer), answer
            assert item.id not in found
            found[item.id] = str(answer)
            if len(found) == N // 3:
                assert len({worker["NodeID"] for worker in ray.nodes() if worker["Alive"]}) == 2
                cluster.remove_node(second, allow_graceful=False)
        assert [found[str(i)] for i in range(N)] == right


def test_a_cluster_of_its_own(items, right):
    """It takes bytes, says what is wrong with one of them, and ends with the last answer."""
    odd = Item(id="odd", about={}, messages=[{"role": "user", "content": [b"no picture", "What does it say?"]}])
    wrong = Item(id="wrong", about={}, messages="Hi", options={"temprature": 1.0})

    def some() -> Iterator[Item]:
        yield from items[:5]
        yield odd
        yield wrong

    pairs = [pair for pair in answers("local", CHOSEN, some(), NEVER) if pair is not None]
    found = {item.id: answer for item, answer in pairs}
    assert len(pairs) == len(found)
    assert not ray.is_initialized()
    assert [str(found[str(i)]) for i in range(5)] == right[:5]
    assert isinstance(found["odd"], Failure)
    assert found["odd"].kind == "ImageError"
    assert isinstance(found["wrong"], Failure)
    assert "temprature" in found["wrong"].reason
    assert len(found) == 7


@pytest.mark.parametrize(
    ("address", "kind", "reason"),
    [
        ("ray://127.0.0.1:10001", MessageError, "address of Ray's client"),
        ("nowhere", MessageError, "expected local, auto or HOST:PORT"),
        ("127.0.0.1:1", BackendUnavailable, "No Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_no_cluster(address, kind, reason):
    with pytest.raises(kind, match=reason):
        next(answers(address, CHOSEN, [], NEVER))


def test_the_command(items, right, tmp_path):
    """Relative names, a file that is no picture, an output that goes on where it was."""
    (tmp_path / "pictures").mkdir()
    for item in items[:10]:
        picture, _ = item.messages[0]["content"]  # type: ignore[index] # made above
        (tmp_path / "pictures" / f"{item.id}.png").write_bytes(picture)
    (tmp_path / "pictures" / "odd.png").write_text("no picture")
    command = [sys.executable, "-m", "edge_runtime", "batch", "pictures", "-p", "What does it say?", "--greedy"]
    command += ["--max-tokens", "8", "--ctx", "4096", "--ray", "local", "-o", "out.jsonl"]
    path = [str(Path(__file__).parents[2] / part) for part in (".", "kernels", "converters")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    for expected in (11, 12):
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert run.returncode == 1, run.stderr
        assert len(lines) == expected, run.stderr
        answers_by_name = {line["id"]: line["answer"] for line in lines}
        assert len(answers_by_name) == expected
        assert [line["error"]["type"] for line in lines if line["error"]] == ["ImageError"]
        assert all(answers_by_name.get(f"pictures/{i}.png", right[i]) == right[i] for i in range(10))
        (tmp_path / "pictures" / "new.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes())
