"""The `ollama` package against a running server, as anybody uses it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

import ollama
import pytest
from pydantic import BaseModel

from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from server.conftest import SIGN
from support.gguf_maker import mini_decoder, mini_mmproj
from support.hub_server import Fault, Hub
from support.hub_server import serve as serve_hub

QUESTION = [{"role": "user", "content": "What does it say?", "images": [SIGN]}]
GREEDY = {"temperature": 0}
DEMO_FILES = sorted(
    Path(str(path))
    for path in resources.files("edge_runtime").joinpath("demo").iterdir()
    if path.name.endswith(".gguf")
)


@pytest.fixture(scope="module")
def api(server) -> Iterator[ollama.Client]:
    with ollama.Client(server.url, trust_env=False) as client:
        yield client


def test_chat_about_a_picture(api):
    reply = api.chat("demo", QUESTION, options=GREEDY)
    assert (reply.message.content, reply.message.role) == ("CAFE", "assistant")
    assert (reply.model, reply.done, reply.done_reason) == ("demo", True, "stop")
    assert reply.message.thinking is None
    assert reply.message.tool_calls is None


def test_counts_and_durations_are_true(api, server):
    reply = api.chat("demo", QUESTION, options=GREEDY)
    (slot,) = server.state.registry.loaded()
    direct = slot.model.chat([{"role": "user", "content": [SIGN, "What does it say?"]}], greedy=True)
    assert (reply.prompt_eval_count, reply.eval_count) == (direct.prompt_tokens, direct.completion_tokens)
    parts = reply.load_duration + reply.prompt_eval_duration + reply.eval_duration
    assert 0 < reply.eval_duration < parts <= reply.total_duration < 60e9


def test_a_stream_says_the_same(api):
    chunks = [*api.chat("demo", QUESTION, options=GREEDY, stream=True)]
    assert "".join(chunk.message.content for chunk in chunks) == "CAFE"
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].done_reason == "stop"
    assert chunks[-1].eval_count > 0
    assert chunks[0].eval_count is None


def test_generate(api):
    reply = api.generate("demo:latest", "What does it say?", images=[SIGN], options=GREEDY)
    assert (reply.response, reply.model, reply.done_reason) == ("CAFE", "demo:latest", "stop")
    chunks = [*api.generate("demo", "What does it say?", images=[SIGN], options=GREEDY, stream=True)]
    assert "".join(chunk.response for chunk in chunks) == "CAFE"


def test_raw_prompts_go_as_they_are(api, server):
    """The prompt that the template would make, sent raw, is the same prompt."""
    (slot,) = server.state.registry.loaded()
    prompt = slot.model.build_prompt("What does it say?").text
    templated = api.generate("demo", "What does it say?", options={**GREEDY, "num_predict": 8})
    raw = api.generate("demo", prompt, raw=True, options={**GREEDY, "num_predict": 8})
    assert raw.prompt_eval_count == templated.prompt_eval_count
    assert raw.response == templated.response
    plain = api.generate("demo", "What does it say?", raw=True, options={**GREEDY, "num_predict": 1})
    assert plain.prompt_eval_count < raw.prompt_eval_count


class Sign(BaseModel):
    word: Literal["EXIT", "CAFE", "TAXI"]


def test_format(api, server):
    """What the model itself says under the schema; the demo model was not taught JSON."""
    schema = Sign.model_json_schema()
    found = api.chat("demo", QUESTION, format=schema, options=GREEDY)
    (slot,) = server.state.registry.loaded()
    direct = slot.model.chat([{"role": "user", "content": [SIGN, "What does it say?"]}], greedy=True, schema=schema)
    assert found.message.content == direct.answer
    assert Sign.model_validate_json(found.message.content)
    anything = api.chat("demo", QUESTION, format="json", options={**GREEDY, "num_predict": 40})
    assert isinstance(json.loads(anything.message.content), dict)


@pytest.mark.parametrize("think", [True, "low"])
def test_think(api, think):
    """Reasoning and answer come apart; the demo model was not taught to reason, so how it does is not looked at."""
    chunks = [*api.chat("demo", QUESTION, think=think, stream=True, options={"num_predict": 12, "seed": 1})]
    assert any(chunk.message.thinking for chunk in chunks)
    assert not any(chunk.message.thinking and chunk.message.content for chunk in chunks)
    assert not any(chunk.message.thinking for chunk in api.chat("demo", QUESTION, think=False, stream=True))


def test_logprobs(api, server):
    reply = api.chat("demo", QUESTION, options=GREEDY, logprobs=True, top_logprobs=2)
    assert "".join(each.token for each in reply.logprobs) == "CAFE"
    assert all(
        each.top_logprobs[0].logprob == each.logprob <= 0 and len(each.top_logprobs) == 2 for each in reply.logprobs
    )


def test_options_change_the_answer(api):
    assert api.chat("demo", QUESTION, options={**GREEDY, "stop": ["F"]}).message.content == "CA"
    short = api.chat("demo", QUESTION, options={**GREEDY, "num_predict": 1})
    assert (short.eval_count, short.done_reason) == (1, "length")
    # Few tokens: a reused beginning moves logits by a last bit, and at this temperature long answers part some time.
    options = {"seed": 7, "temperature": 9.0, "top_k": 0, "top_p": 1.0, "num_predict": 8}
    drawn = [api.chat("demo", QUESTION, options=options) for _ in "ab"]
    assert drawn[0].message.content == drawn[1].message.content != "CAFE"


def test_list_show_ps(api):
    (listed,) = [model for model in api.list().models if model.model == "demo:latest"]
    assert listed.size == sum(path.stat().st_size for path in DEMO_FILES)
    assert (listed.details.format, listed.details.family, listed.details.quantization_level) == (
        "gguf",
        "qwen3",
        "Q4_K_M",
    )
    shown = api.show("demo")
    assert shown.details == listed.details
    assert {"completion", "vision"} == set(shown.capabilities)  # a toy claims no more; see test_ollama_models
    assert shown.modelinfo["general.architecture"] == "qwen3"
    assert shown.modelinfo["tokenizer.ggml.tokens"] is None
    assert shown.template == OFFICIAL_CHAT_TEMPLATE
    assert "FROM demo:latest" in shown.modelfile
    api.chat("demo", QUESTION, options=GREEDY)
    (loaded,) = api.ps().models
    assert (loaded.model, loaded.digest, loaded.size_vram) == ("demo:latest", listed.digest, 0)
    assert loaded.context_length > 1000
    assert loaded.size > 0


def test_what_is_not_there_is_told(api):
    with pytest.raises(ollama.ResponseError, match="model 'nothing' not found") as caught:
        api.chat("nothing", QUESTION)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does not support embeddings") as caught:
        api.embed("demo", "text")
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="does not support embeddings"):
        api.embeddings("demo", "text")
    with pytest.raises(ollama.ResponseError, match="cannot fill in text before a suffix"):
        api.generate("demo", "a", suffix="b")


# --- the store -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the demo model as `org/demo`, and a store of the test's own."""
    from huggingface_hub import close_session, constants

    from edge_runtime.store import download

    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    files = {f"org/demo/{path.name}": path.read_bytes() for path in DEMO_FILES}
    files |= {"org/pair/m-Q8_0.gguf": mini_decoder().build(), "org/pair/mmproj-m.gguf": mini_mmproj(256).build()}
    with serve_hub(Hub(files)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(download, "FIRST_WAIT_S", 0.0)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def own(hub, serve) -> Iterator[ollama.Client]:
    """A client of a server whose store is empty and may be changed."""
    with ollama.Client(serve().url, trust_env=False) as client:
        yield client


def names(client: ollama.Client) -> set[str]:
    return {model.model for model in client.list().models}


PULLED = f"hf:org/demo:{DEMO_FILES[0].name}"


def test_pull_with_progress_then_ask_then_delete(own, hub):
    hub.faults.append(Fault(cut_after=1_000_000))
    steps = [*own.pull("hf.co/org/demo", stream=True)]
    assert (steps[0].status, steps[-1].status) == ("pulling manifest", "success")
    sizes = {step.digest: step.total for step in steps if step.digest}
    assert sorted(sizes.values()) == sorted(path.stat().st_size for path in DEMO_FILES)
    assert set(sizes) == {f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in DEMO_FILES}
    for digest, total in sizes.items():
        done = [step.completed for step in steps if step.digest == digest]
        assert done == sorted(done)
        assert done[-1] == total
    assert PULLED in names(own)
    assert own.chat("hf.co/org/demo", QUESTION, options=GREEDY).message.content == "CAFE"
    assert own.show(PULLED).modelinfo["general.architecture"] == "qwen3"
    assert own.delete(PULLED).status == "success"
    assert PULLED not in names(own)
    with pytest.raises(ollama.ResponseError, match="not found"):
        own.chat(PULLED, QUESTION)


def test_pull_without_a_stream(own):
    assert own.pull("hf:org/demo").status == "success"
    assert own.pull("demo").status == "success"


def test_pulls_that_fail_say_so(own, hub):
    with pytest.raises(ollama.ResponseError, match="cannot be pulled"):
        own.pull("llama3.2")
    with pytest.raises(ollama.ResponseError, match="only pulled from hubs") as caught:
        own.pull(f"{hub.url}/cdn/org/demo/{DEMO_FILES[0].name}")
    assert caught.value.status_code == 403
    steps = own.pull("hf:org/nothing", stream=True)
    assert next(steps).status == "pulling manifest"
    with pytest.raises(ollama.ResponseError, match="org/nothing"):
        next(steps)
    with pytest.raises(ollama.ResponseError, match="256; expected the two files of one model"):
        own.pull("hf:org/pair")
    assert names(own) == {"demo:latest"}


def test_create_from_a_model(own):
    reply = own.create(
        "pirate",
        from_="demo",
        system="Answer in one word.",
        parameters={"temperature": 0, "stop": ["E"], "num_predict": 50},
        messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ahoy"}],
        license="Mine",
    )
    assert reply.status == "success"
    before = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Ahoy"},
    ]
    whole = own.chat("demo", [*before, *QUESTION], options={"temperature": 0, "num_predict": 50}).message.content
    assert "E" in whole
    assert own.chat("pirate", QUESTION).message.content == whole.split("E")[0]
    assert own.chat("pirate", QUESTION, options={"stop": [whole[0]]}).message.content == whole.split(whole[0])[0]
    shown = own.show("pirate")
    assert (shown.license, shown.details.parent_model) == ("Mine", "demo")
    assert [line.split() for line in shown.parameters.splitlines()] == [
        ["num_predict", "50"],
        ["stop", '"E"'],
        ["temperature", "0"],
    ]
    assert 'SYSTEM """Answer in one word."""' in shown.modelfile
    again = own.create("pirate:v2", from_="pirate", system="Talk.", stream=True)
    assert [step.status for step in again][-1] == "success"
    assert names(own) == {"demo:latest", "pirate:latest", "pirate:v2"}
    assert own.show("pirate:v2").parameters == shown.parameters


def test_the_words_of_a_created_model_reach_the_prompt(own):
    plain = own.chat("demo", [{"role": "user", "content": "Hi"}], options={"num_predict": 1})
    own.create("wordy", from_="demo", system="You are a parrot who repeats everything.")
    wordy = own.chat("wordy", [{"role": "user", "content": "Hi"}], options={"num_predict": 1})
    told = own.chat(
        "demo",
        [
            {"role": "system", "content": "You are a parrot who repeats everything."},
            {"role": "user", "content": "Hi"},
        ],
        options={"num_predict": 1},
    )
    assert wordy.prompt_eval_count == told.prompt_eval_count > plain.prompt_eval_count
    own_words = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}]
    assert own.chat("wordy", own_words, options={"num_predict": 1}).prompt_eval_count < wordy.prompt_eval_count


def test_create_from_uploads(own):
    digests = {path.name: own.create_blob(path) for path in DEMO_FILES}
    own.create("mine", files=digests, stream=False)
    assert own.chat("mine", QUESTION, options=GREEDY).message.content == "CAFE"
    own.copy("mine", "second")
    own.delete("mine")
    assert own.chat("second", QUESTION, options=GREEDY).message.content == "CAFE"
    own.delete("second")
    assert names(own) == {"demo:latest"}
    with pytest.raises(ollama.ResponseError, match="No upload has the digest"):
        own.create("mine", files=digests)


def test_copies_keep_the_files_of_a_pulled_model(own, tmp_path):
    own.pull("hf:org/demo")
    own.copy(PULLED, "mine")
    own.delete(PULLED)
    assert names(own) == {"demo:latest", "mine:latest"}
    assert own.chat("mine", QUESTION, options=GREEDY).message.content == "CAFE"
    own.delete("mine")
    assert names(own) == {"demo:latest"}
    assert not [*(tmp_path / "models").rglob("*.gguf")]


def test_what_the_owner_gave_stays(own):
    with pytest.raises(ollama.ResponseError, match="clients cannot delete it") as caught:
        own.delete("demo")
    assert caught.value.status_code == 403
    with pytest.raises(ollama.ResponseError, match="choose another"):
        own.copy("demo", "demo")
    with pytest.raises(ollama.ResponseError, match="not found"):
        own.delete("nothing")
    with pytest.raises(ollama.ResponseError, match="is not allowed; expected letters"):
        own.copy("demo", "../../etc/x")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"from_": "/etc/passwd"}, "looks like a path"),
        ({"from_": "nothing"}, "not found"),
        ({"files": {"a.gguf": "sha256:../../etc/passwd"}}, "expected sha256: and 64"),
        ({"from_": "demo", "adapters": {"a": "sha256:" + "0" * 64}}, "No upload has the digest"),
        ({"from_": "demo", "quantize": "q4_0"}, "edge-runtime convert"),
        ({"from_": "demo", "parameters": {"temperature": "hot"}}, "expected a number"),
        ({}, "Neither 'from' nor 'files'"),
    ],
)
def test_models_that_cannot_be_made(own, arguments, reason):
    with pytest.raises(ollama.ResponseError, match=reason):
        own.create("mine", **arguments)
    assert names(own) == {"demo:latest"}


def test_uploads_are_checked(own, tmp_path):
    half = tmp_path / "half.gguf"
    half.write_bytes(DEMO_FILES[0].read_bytes()[:100_000])
    with pytest.raises(ollama.ResponseError, match="cut short") as caught:
        own.create("mine", files={"half.gguf": own.create_blob(half)})
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ollama.ResponseError, match="There is no mmproj file"):
        own.create("mine", files={"a.gguf": own.create_blob(DEMO_FILES[0])})
