"""What owners look at, and llama-server's way to tokens."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.server.inference import Outcome
from edge_runtime.server.metrics import MAX_NAMES, OTHERS, Metrics
from edge_runtime.server.recent_rates import KEPT
from server.asked import SIGN_BASE64 as PICTURE
from server.conftest import Served
from server.made_answers import made_answer


def numbers(served: Served) -> dict[str, float]:
    """Samples of the demo model and of the process, by name."""
    text = httpx.get(served.url + "/metrics", trust_env=False).text
    return {
        sample.name
        + "".join(f"[{value}]" for name, value in sorted(sample.labels.items()) if name != "model"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model", "demo") == "demo"
    }


def test_metrics_are_no_larger_for_many_names(server):
    """A model may be copied to any number of names, and asked by each."""
    counted = Metrics(server.state.inference, server.state.batches)
    for i in range(3 * MAX_NAMES):
        counted.record(Outcome(f"copy-{i}", 0.0, [made_answer(timings_s={"first_token": 0.1})]))
    counted.record(Outcome("copy-0", 0.0, [made_answer()]))
    server.state.inference.on_end.remove(counted.record)
    families = {family.name: family for family in text_string_to_metric_families(counted.text().decode())}
    samples = families["edge_runtime_requests"].samples
    totals = {sample.labels["model"]: sample.value for sample in samples if sample.name.endswith("_total")}
    assert len(totals) == MAX_NAMES + 1
    assert (totals["copy-0"], totals[OTHERS], sum(totals.values())) == (2, 2 * MAX_NAMES, 3 * MAX_NAMES + 1)


def test_a_processor_that_slows_down_shows_in_the_rates_of_the_last_answers(server):
    """While the counters since the start hardly move; answers from the cache and short prompts say nothing."""
    counted = Metrics(server.state.inference, server.state.batches)
    server.state.inference.on_end.remove(counted.record)

    def answer(slowness: float, **fields: Any) -> None:
        timings = {"prefill": 10 * slowness, "decode": 5 * slowness, "encode": 8 * slowness}
        usual = {"prompt_tokens": 320, "cached_tokens": 20, "completion_tokens": 21, "encoded_slices": 4}
        counted.record(Outcome("demo", 0.0, [made_answer(timings_s=timings, **usual | fields)]))

    def rates() -> list[float]:
        families = {family.name: family for family in text_string_to_metric_families(counted.text().decode())}
        names = ("prefill_tokens_per_second", "decode_tokens_per_second", "seconds_per_slice")
        return [sample.value for name in names for sample in families[f"edge_runtime_last_{name}"].samples]

    assert rates() == []
    for _ in range(100):
        answer(1.0)
    assert rates() == pytest.approx([30, 4, 2])
    answer(9.0, cached_tokens=300, completion_tokens=1, encoded_slices=0)
    assert rates() == pytest.approx([30, 4, 2])
    for _ in range(KEPT // 2):
        answer(3.0)
    assert rates() == pytest.approx([15, 2, 4])
    for _ in range(KEPT // 2):
        answer(3.0)
    assert rates() == pytest.approx([10, 4 / 3, 6])
    total = re.search(r'edge_runtime_work_seconds_total{model="demo",stage="prefill"} (\S+)', counted.text().decode())
    assert total is not None
    assert float(total[1]) < 1.4 * 10 * (100 + 1 + KEPT)  # the mean since the start rose by less than half


def test_answers_to_one_prompt_count_its_prefill_once(server):
    counted = Metrics(server.state.inference, server.state.batches)
    server.state.inference.on_end.remove(counted.record)
    timings = {"prefill": 10.0, "decode": 8.0, "encode": 2.0}
    one = made_answer(timings_s=timings, prompt_tokens=105, cached_tokens=5, encoded_slices=1)
    other = made_answer(timings_s={"prefill": 0.1, "decode": 8.0}, prompt_tokens=105, cached_tokens=104)
    counted.record(Outcome("demo", 0.0, [one, other]))
    text = counted.text().decode()
    assert 'edge_runtime_last_prefill_tokens_per_second{model="demo"} 10.0' in text
    assert 'edge_runtime_last_decode_tokens_per_second{model="demo"} 1.0' in text


def test_health(client):
    assert client.get("/health").json() == {"status": "ok", "open_requests": 0, "max_requests": 64}
    assert client.head("/api/version").status_code in (200, 405)


def test_metrics_count_what_happens(server, client):
    """Twice the same picture: the second time its visual tokens and the whole beginning are known."""
    message = {"role": "user", "content": "What does it say?", "images": [PICTURE]}
    body = {"model": "demo", "messages": [message], "stream": False, "options": {"temperature": 0}}
    client.post("/api/chat", json=body)
    before = numbers(server)
    reply = client.post("/api/chat", json=body).json()
    client.post("/api/chat", json={**body, "messages": [{"role": "nobody"}]})
    after = numbers(server)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["edge_runtime_requests_total[ok]"] == 1
    assert grown["edge_runtime_completion_tokens_total"] == reply["eval_count"]
    assert grown["edge_runtime_visual_tokens_total"] > 0
    assert grown["edge_runtime_prompt_tokens_total"] > grown["edge_runtime_cached_prompt_tokens_total"] > 0
    assert grown["edge_runtime_time_to_first_token_seconds_count"] == 1
    assert 0 < grown["edge_runtime_time_to_first_token_seconds_sum"] < 60
    assert grown["edge_runtime_work_seconds_total[decode]"] > 0
    assert after["edge_runtime_anonymous_memory_bytes"] > 1e6
    assert after["edge_runtime_model_bytes"] > 1e5
    assert after["edge_runtime_picture_cache_bytes"] > 1000
    assert after["edge_runtime_max_requests"] == server.state.settings.max_queue
    assert after["edge_runtime_open_requests"] == after["edge_runtime_queue"] == after["edge_runtime_running"] == 0
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "seconds_per_slice"):
        assert after[f"edge_runtime_last_{name}"] > 0
    assert after["edge_runtime_picture_lookups_total"] >= after["edge_runtime_picture_hits_total"] >= 0


def test_metrics_have_no_label_of_a_client(server, client):
    client.post("/api/chat", json={"model": "made-up-name", "messages": []})
    assert "made-up-name" not in client.get("/metrics").text


def test_props(client):
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] > 0
    assert props["total_slots"] > 1
    assert props["modalities"]["vision"] is True
    assert "<|im_start|>" in props["chat_template"]
    assert "/" not in props["model_path"]
    assert client.get("/props", params={"model": "nothing"}).status_code == 404


@pytest.mark.parametrize("text", ["", "Hello, wörld", "<|im_end|> 😀", "a\nb", "\udc80"])
def test_tokens_there_and_back(client, text):
    body = '{"content": "' + "".join(f"\\u{unit:04x}" for unit in units(text)) + '"}'
    tokens = client.post("/tokenize", content=body).json()["tokens"]
    found = client.post("/detokenize", json={"tokens": tokens}).json()["content"]
    assert found == re.sub("[\ud800-\udfff]", "\ufffd", text)


def units(text: str) -> list[int]:
    """Numbers of UTF-16, as JSON escapes have them."""
    data = text.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]


def test_special_tokens_and_pieces(client):
    one = client.post("/tokenize", json={"content": "<|im_end|>", "with_pieces": True}).json()["tokens"]
    assert [token["piece"] for token in one] == ["<|im_end|>"]
    plain = client.post("/tokenize", json={"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert len(plain) > 1
    halves = client.post("/tokenize", json={"content": "😀", "with_pieces": True}).json()["tokens"]
    assert all(isinstance(token["piece"], str | list) for token in halves)


def test_tokens_that_are_none(client):
    for tokens in ([-1], [10**9], ["a"], "abc"):
        assert client.post("/detokenize", json={"tokens": tokens}).status_code == 400
    assert client.post("/tokenize", json={"content": 5}).status_code == 400
    assert client.post("/tokenize", json={"content": "a", "model": "nothing"}).status_code == 404
