"""Ray Data's own HTTP processor against our server, as docs/scaling.md shows it. Run by `test_ray`."""

from __future__ import annotations

import runpy
from pathlib import Path

import ray

from on_ray.cluster import two_nodes
from server.asked import SIGN
from server.test_serve_command import process

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_http.py"


def test_the_example(tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        (pictures / f"{i}.png").write_bytes(SIGN.read_bytes())
    with process(tmp_path, "-m", "demo") as (_, address), two_nodes() as (cluster, _):
        ray.init(address=cluster.address, log_to_driver=False)
        answers = runpy.run_path(str(EXAMPLE))["ask"](str(pictures), f"{address}/v1", "demo", "What does it say?")
        found = {row["path"].rpartition("/")[2]: row["answer"] for row in answers.take_all()}
    assert found == {f"{i}.png": "CAFE" for i in range(6)}
