"""Every field of Ollama's requests (api/types.go) and every option: what becomes of it.

done      it reaches the model, or decides about the reply
refused   400, with the field's name and what to do: the answer would look like one that follows it
passed    it cannot change what the answer must be: how a model is loaded, or how tokens are drawn
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from edge_runtime.server.registry import loaded as models
from edge_runtime.server.settings import Settings
from server.conftest import running
from server.scripted import ScriptedModel, say

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
Ask = Callable[..., tuple[httpx.Response, dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(own_store):
    """Send a request; returns the reply and what the model was asked for."""
    model = ScriptedModel(say("Hi"))
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # until it has started: other servers load the model itself
            patch.setattr(models, "Model", lambda paths, options: model)
            url = stack.enter_context(running(Settings(port=0, models=("demo",)))).url
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60, trust_env=False))

        def send(route: str, **fields: Any) -> tuple[httpx.Response, dict[str, Any]]:
            base = {"messages": HELLO} if route == "chat" else {"prompt": "Hello"}
            model.asked.clear()
            reply = client.post(f"/api/{route}", json={"model": "demo", "stream": False, **base, **fields})
            return reply, model.asked[-1][1] if model.asked else {}

        yield send


# --- fields --------------------------------------------------------------------------------------------------------

BOTH: dict[str, tuple[Any, str]] = {
    "format": (SCHEMA, "done"),
    "options": ({"temperature": 0.5}, "done"),
    "keep_alive": ("5m", "done"),
    "think": (True, "done"),
    "truncate": (False, "done"),
    "logprobs": (True, "done"),
    "shift": (False, "passed"),
    "shift ": (True, "passed"),
    "_debug_render_only": (True, "refused"),
    "a_field_that_nobody_knows": ("x", "passed"),
    "temperature": (0.5, "passed"),
    "metadata": ({"chat_id": "x"}, "passed"),
    # Words of other APIs that bind an answer.
    "json_schema": (SCHEMA, "refused"),
    "schema": (SCHEMA, "refused"),
    "response_format": ({"type": "json_object"}, "refused"),
    "structured_outputs": ({"json": SCHEMA}, "refused"),
    "guided_json": (SCHEMA, "refused"),
    "guided_choice": (["a", "b"], "refused"),
    "guided_regex": ("a+", "refused"),
    "grammar": ('root ::= "a"', "refused"),
    "stop": (["x"], "refused"),
    "num_predict": (3, "refused"),
    "max_tokens": (3, "refused"),
    "n": (2, "refused"),
    "logit_bias": ({"1": -100}, "refused"),
    "reasoning_effort": ("low", "refused"),
}
CHAT = {
    "tools": ([TOOL], "done"),
    "tool_choice": ("none", "done"),
    "system": ("Be brief.", "done"),
    "prompt": ("Hello", "refused"),
    "images": (["aGVsbG8="], "refused"),
    "suffix": ("x", "refused"),
    "template": ("{{ .Prompt }}", "refused"),
    "raw": (True, "refused"),
    "context": ([1, 2], "refused"),
    "functions": ([TOOL["function"]], "refused"),
}
GENERATE = {
    "system": ("Be brief.", "done"),
    "context": ([1, 2], "done"),
    "raw": (True, "done"),
    "suffix": ("x", "refused"),
    "template": ("{{ .Prompt }}", "refused"),
    "messages": (HELLO, "refused"),
    "tools": ([TOOL], "refused"),
    "tool_choice": ("required", "refused"),
    "width": (512, "refused"),
    "steps": (4, "refused"),
}
TABLE = [
    *(("chat", name, *rest) for name, rest in {**BOTH, **CHAT}.items()),
    *(("generate", name, *rest) for name, rest in {**BOTH, **GENERATE}.items()),
]


@pytest.mark.parametrize(("route", "name", "value", "becomes"), TABLE, ids=[f"{r}-{n}" for r, n, *_ in TABLE])
def test_fields(ask: Ask, route, name, value, becomes):
    name = name.strip()
    plain = ask(route)
    reply, asked = ask(route, **{name: value})
    if becomes == "refused":
        assert reply.status_code == 400, reply.text
        assert name in reply.json()["error"]
        assert not asked
        return
    assert reply.status_code == 200, reply.text
    if becomes == "passed":
        assert asked == plain[1]
    elif name not in ("keep_alive", "system", "context"):
        assert asked != plain[1]


@pytest.mark.parametrize("nothing", [None, "", [], {}, False])
@pytest.mark.parametrize("name", ["suffix", "template", "grammar", "response_format", "stop", "json_schema"])
def test_fields_that_say_nothing_are_no_fields(ask: Ask, name, nothing):
    """Clients send every field that they know."""
    if name in ("suffix", "template") and nothing not in (None, ""):
        return
    assert ask("generate", **{name: nothing})[0].status_code == 200


@pytest.mark.parametrize("field", ["system", "context", "template"])
def test_raw_prompts_have_nothing_beside_them(ask: Ask, field):
    reply, _ = ask("generate", raw=True, **{field: [1] if field == "context" else "x"})
    assert reply.status_code == 400
    assert field in reply.json()["error"]


@pytest.mark.parametrize(("n", "status"), [(0, 200), (20, 200), (21, 400), (-1, 400)])
@pytest.mark.parametrize("route", ["chat", "generate"])
def test_top_logprobs(ask: Ask, route, n, status):
    assert ask(route, logprobs=True, top_logprobs=n)[0].status_code == status
    assert ask(route, top_logprobs=n)[0].status_code == status  # in Ollama, too


def test_roles_in_any_case(ask: Ask):
    assert ask("chat", messages=[{"role": "System", "content": "x"}, {"role": "USER", "content": "y"}])[0].is_success


def test_a_system_prompt_beside_the_messages(client):
    """Open WebUI sends it so; it is said, and said once."""
    body = {"model": "demo", "stream": False, "options": {"num_predict": 1}}
    said = [{"role": "system", "content": "Be brief."}]
    counts = [
        client.post("/api/chat", json={**body, **more}).json()["prompt_eval_count"]
        for more in (
            {"messages": [*said, *HELLO]},
            {"messages": HELLO, "system": "Be brief."},
            {"messages": [*said, *HELLO], "system": "Be brief."},
            {"messages": HELLO},
        )
    ]
    assert counts[0] == counts[1] == counts[2] > counts[3]


def test_truncate_is_what_ollama_does_unless_told_not_to(ask: Ask):
    for route in ("chat", "generate"):
        assert ask(route)[1]["context_shift"] is True
        assert ask(route, truncate=True)[1]["context_shift"] is True
        assert "context_shift" not in ask(route, truncate=False)[1]


@pytest.mark.parametrize(("level", "budget"), [("low", 256), ("medium", 1024), ("high", None), ("max", None)])
def test_think_levels(ask: Ask, level, budget):
    asked = ask("chat", think=level)[1]
    assert (asked["thinking"], asked["thinking_budget"]) == (True, budget)


# --- options -------------------------------------------------------------------------------------------------------

DONE: dict[str, tuple[Any, str, Any]] = {
    "num_predict": (7, "max_tokens", 7),
    "max_tokens": (7, "max_tokens", 7),
    "n_predict": (7, "max_tokens", 7),
    "seed": (3, "seed", 3),
    "stop": (["x"], "stop", ["x"]),
    "temperature": (0.5, "temperature", 0.5),
    "top_k": (5, "top_k", 5),
    "top_p": (0.5, "top_p", 0.5),
    "min_p": (0.1, "min_p", 0.1),
    "typical_p": (0.5, "typical_p", 0.5),
    "repeat_penalty": (1.3, "repetition_penalty", 1.3),
    "repetition_penalty": (1.3, "repetition_penalty", 1.3),
    "repeat_last_n": (0, "repetition_penalty", 1.0),
    "presence_penalty": (0.5, "presence_penalty", 0.5),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "max_slices": (2, "max_slices", 2),
    "image_max_tokens": (64 * 5, "max_slices", 4),  # four cells and the overview
}
PASSED = {
    # How a model is loaded; num_ctx is the owner's (--ctx), and what does not fit is dropped or refused as always.
    **dict.fromkeys(
        ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "draft_num_predict"), 8
    ),
    **dict.fromkeys(("use_mmap", "use_mlock", "numa", "low_vram", "f16_kv", "logits_all", "vocab_only"), True),
    # How tokens are drawn, in older versions of Ollama; today's leaves them out with a warning.
    "mirostat": 2,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "tfs_z": 0.9,
    "penalize_newline": True,
    "an_option_that_nobody_knows": 1,
}
REFUSED = {
    "grammar": 'root ::= "a"',
    "format": "json",
    "json_schema": SCHEMA,
    "response_format": {"type": "json_object"},
    "guided_choice": ["a"],
    "tools": [TOOL],
    "tool_choice": "required",
    "system": "Be brief.",
    "think": True,
    "logprobs": True,
    "n": 2,
    "logit_bias": {"1": -100},
    "truncate": False,
}


@pytest.mark.parametrize("name", DONE)
@pytest.mark.parametrize("route", ["chat", "generate"])
def test_options_that_are_done(ask: Ask, route, name):
    value, target, expected = DONE[name]
    reply, asked = ask(route, options={name: value})
    assert (reply.status_code, asked[target]) == (200, expected)
    assert target not in asked or asked != ask(route)[1]


@pytest.mark.parametrize("name", PASSED)
def test_options_that_are_passed_over(ask: Ask, name):
    reply, asked = ask("chat", options={name: PASSED[name]})
    assert reply.status_code == 200
    assert asked == ask("chat")[1]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("route", ["chat", "generate"])
def test_options_that_are_refused(ask: Ask, route, name):
    reply, asked = ask(route, options={name: REFUSED[name]})
    assert (reply.status_code, asked) == (400, {})
    assert name in reply.json()["error"]


@pytest.mark.parametrize("n", [0, -1, -2, -5])
def test_no_limit(ask: Ask, n):
    """0 in saved presets means what it means in Ollama's runners, where a limit is one above 0."""
    reply, asked = ask("chat", options={"num_predict": n})
    assert (reply.status_code, reply.json()["done"], asked["max_tokens"]) == (200, True, 32768)


@pytest.mark.parametrize(
    ("options", "slices"),
    [
        ({"image_max_tokens": 64}, 1),
        ({"image_max_tokens": 128}, 1),
        ({"image_max_tokens": 191}, 1),
        ({"image_max_tokens": 192}, 2),
        ({"image_max_tokens": 640}, 9),
        ({"image_max_tokens": 100_000, "max_slices": 3}, 3),
        ({"image_max_tokens": 192, "max_slices": 9}, 2),
    ],
)
def test_a_picture_takes_no_more_than_its_tokens(ask: Ask, options, slices):
    assert ask("chat", options=options)[1]["max_slices"] == slices


@pytest.mark.parametrize(
    "options", [{"image_max_tokens": 63}, {"image_max_tokens": 0}, {"max_slices": 0}, {"max_slices": 1.5}]
)
def test_limits_that_no_picture_can_keep(ask: Ask, options):
    reply, _ = ask("chat", options=options)
    assert reply.status_code == 400
    assert next(iter(options)) in reply.json()["error"]


@pytest.mark.parametrize("value", [1e12, "1e3h", "99999999999h", 10**30, "1000000h30m", -1e300])
def test_keep_alive_beyond_all_measure(ask: Ask, value):
    reply, _ = ask("chat", keep_alive=value)
    assert reply.status_code == (400 if value == "1e3h" else 200), reply.text
    json.loads(reply.text)
