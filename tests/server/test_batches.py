"""Files and batches as OpenAI's package uses them, unchanged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from server.conftest import Served, openai_client

CHAT = "/v1/chat/completions"


@pytest.fixture
def own_folder(own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own: one server at a time keeps the files of a store."""
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    return tmp_path / "models" / ".served" / "batches"


@pytest.fixture
def served(own_folder: Path, serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture
def ai(served: Served) -> Iterator[openai.OpenAI]:
    with openai_client(served) as client:
        yield client


def request(custom_id: str, text: str = "Hi", url: str = CHAT, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(ai: openai.OpenAI, data: bytes, **more: Any) -> Any:
    return ai.files.create(file=("requests.jsonl", data), purpose="batch", **more)


def start(ai: openai.OpenAI, *lines: Any, **more: Any) -> Any:
    return ai.batches.create(
        **{"input_file_id": upload(ai, jsonl(*lines)).id, "endpoint": CHAT, "completion_window": "24h", **more}
    )


def ended(ai: openai.OpenAI, batch_id: str, seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while (found := ai.batches.retrieve(batch_id)).status in (
        "validating",
        "in_progress",
        "finalizing",
        "cancelling",
    ):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def content(ai: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(line) for line in ai.files.content(file_id).text.splitlines()]


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(ai):
    data = jsonl(*(request(f"{i}") for i in range(1000)))
    made = upload(ai, data)
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "requests.jsonl", "batch")
    assert made.expires_at == made.created_at + 30 * 86_400
    assert ai.files.retrieve(made.id) == made
    assert ai.files.content(made.id).read() == data
    assert [*ai.files.list()] == [made]
    assert ai.files.delete(made.id).deleted
    for ask in (ai.files.retrieve, ai.files.content, ai.files.delete):
        with pytest.raises(openai.NotFoundError, match="No file has the id"):
            ask(made.id)


def test_files_are_listed_by_pages(ai):
    made = [upload(ai, b"{}\n").id for _ in range(5)]
    assert [file.id for file in ai.files.list(limit=2)] == made[::-1]  # the package asks for the next pages
    assert [file.id for file in ai.files.list(limit=2, order="asc")] == made
    assert ai.files.list(limit=2).has_more
    assert [*ai.files.list(purpose="vision")] == []
    with pytest.raises(openai.BadRequestError, match="after is 'file-none'"):
        ai.files.list(after="file-none")
    with pytest.raises(openai.BadRequestError, match="limit"):
        ai.files.list(limit=0)


def test_how_long_a_file_is_kept(ai, served):
    made = upload(ai, b"{}\n", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    for wrong in ({"anchor": "created_at", "seconds": 1}, {"anchor": "created_at", "seconds": 10**9}):
        with pytest.raises(openai.BadRequestError, match=r"expires_after\.seconds is"):
            upload(ai, b"{}\n", expires_after=wrong)
    with pytest.raises(openai.BadRequestError, match=r"expires_after\[anchor\] is 'now'"):
        upload(ai, b"{}\n", expires_after={"anchor": "now", "seconds": 3600})
    assert [file.id for file in ai.files.list()] == [made.id]


@pytest.mark.parametrize("purpose", ["fine-tune", "vision", "user_data", "assistants", "what"])
def test_other_purposes_are_refused_by_name(ai, purpose):
    with pytest.raises(openai.BadRequestError, match=f"purpose is '{purpose}'"):
        ai.files.create(file=("a", b"x"), purpose=purpose)
    assert [*ai.files.list()] == []


# --- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_from_its_start_to_its_answers(ai, own_folder):
    lines = [request(f"{i}", f"Question {i}") for i in range(5)]
    made = start(ai, *lines, metadata={"night": "1"})
    assert (made.object, made.status, made.endpoint, made.metadata) == ("batch", "validating", CHAT, {"night": "1"})
    assert made.expires_at == made.created_at + 86_400
    done = ended(ai, made.id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (5, 5, 0)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.error_file_id is None
    answers = content(ai, done.output_file_id)
    assert sorted(line["custom_id"] for line in answers) == [f"{i}" for i in range(5)]
    assert {line["response"]["status_code"] for line in answers} == {200}
    bodies = [openai.types.chat.ChatCompletion.model_validate(line["response"]["body"]) for line in answers]
    assert all(body.usage.completion_tokens for body in bodies)
    assert ai.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert [batch.id for batch in ai.batches.list()] == [made.id]
    assert ai.files.delete(made.input_file_id).deleted
    assert ai.files.delete(done.output_file_id).deleted
    assert [path.suffix for path in (own_folder / "batches").iterdir()] == [".json"]
    assert [*(own_folder / "files").iterdir()] == []


def test_every_endpoint(ai):
    text = request("a", url="/v1/completions") | {"body": {"prompt": "Hi", "max_tokens": 2}}
    response = request("a", url="/v1/responses") | {"body": {"input": "Hi", "max_output_tokens": 16}}
    for line, kind in ((text, "text_completion"), (response, "response")):
        done = ended(ai, start(ai, line, endpoint=line["url"]).id)
        (answer,) = content(ai, done.output_file_id)
        assert answer["response"]["body"]["object"] == kind


def test_lines_that_fail_have_a_file_of_their_own(ai):
    lines = [request("good"), request("bad", messages="none"), request("long", "x " * 20_000)]
    done = ended(ai, start(ai, *lines).id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 2)
    assert [line["custom_id"] for line in content(ai, done.output_file_id)] == ["good"]
    errors = {line["custom_id"]: line["response"] for line in content(ai, done.error_file_id)}
    assert errors["bad"]["status_code"] == 400
    assert errors["long"]["body"]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "data, code, line",
    [
        (b"", "empty_file", None),
        (b"\n\n", "empty_file", None),
        (b"{}\n{", "missing_required_parameter", 1),
        (jsonl(request("a")) + b"\xff\xfe\n", "invalid_json_line", 2),
        (jsonl(request("a"), request("a")), "duplicate_custom_id", 2),
        (jsonl(request("a"), request("b", url="/v1/completions")), "url_mismatch", 2),
        (jsonl(request("a", stream=True)), "invalid_value", 1),
        (jsonl(request("a", model="nobody")), "model_not_found", None),
    ],
    ids=range(8),
)
def test_a_file_that_cannot_be_worked_through_fails_at_once(ai, data, code, line):
    made = ai.batches.create(input_file_id=upload(ai, data).id, endpoint=CHAT, completion_window="24h")
    done = ended(ai, made.id)
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.failed_at
    assert (done.errors.data[0].code, done.errors.data[0].line) == (code, line)
    assert ai.files.delete(made.input_file_id).deleted


@pytest.mark.parametrize(
    "wrong, what",
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint is '/v1/embeddings'"),
        ({"endpoint": "/v1/files"}, "endpoint is"),
        ({"completion_window": "1y"}, "completion_window is '1y'"),
        ({"completion_window": "31d"}, "completion_window is '31d'"),
        ({"metadata": {f"{i}": "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, r"output_expires_after\.seconds is 5"),
    ],
)
def test_batches_that_are_refused(ai, wrong, what):
    with pytest.raises(openai.BadRequestError, match=what):
        start(ai, request("a"), **wrong)
    assert [*ai.batches.list()] == []


def test_a_file_that_does_not_exist(ai):
    for name in ("file-" + "0" * 32, "../../../etc/passwd", "file-x", "%2e%2e/x"):
        with pytest.raises(openai.NotFoundError, match="No file has the id"):
            ai.batches.create(input_file_id=name, endpoint=CHAT, completion_window="24h")


def test_how_long_the_answers_are_kept(ai):
    wish = {"anchor": "created_at", "seconds": 7200}
    done = ended(ai, start(ai, request("a"), output_expires_after=wish).id)
    file = ai.files.retrieve(done.output_file_id)
    assert file.expires_at == file.created_at + 7200


def test_cancelling_keeps_the_answers_so_far(ai, served, endless, monkeypatch):
    lines = [request("short", max_tokens=1), *(request(f"{i}", max_tokens=1500) for i in range(20))]
    made = start(ai, *lines)
    with pytest.raises(openai.ConflictError, match="read by a batch"):
        ai.files.delete(made.input_file_id)
    with pytest.raises(openai.BadRequestError, match="which has not ended"):
        ai.batches.create(input_file_id=made.input_file_id, endpoint=CHAT, completion_window="24h")
    end = time.monotonic() + 60
    while not ai.batches.retrieve(made.id).request_counts.completed:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert ai.batches.cancel(made.id).status in ("cancelling", "cancelled")
    done = ended(ai, made.id)
    assert (done.status, done.request_counts.total) == ("cancelled", 21)
    assert done.cancelling_at <= done.cancelled_at
    answered = [line["custom_id"] for line in content(ai, done.output_file_id)]
    left = content(ai, done.error_file_id)
    assert "short" in answered
    assert sorted([*answered, *(line["custom_id"] for line in left)]) == sorted(line["custom_id"] for line in lines)
    assert {line["error"]["code"] for line in left} == {"batch_cancelled"}
    assert not served.state.inference.n_open
    with pytest.raises(openai.ConflictError, match="is cancelled"):
        ai.batches.cancel(made.id)


@pytest.mark.parametrize("status", ["validating", "in_progress"])
def test_what_is_not_done_in_time_expires(ai, served, monkeypatch, status):
    monkeypatch.setattr(served.state.batches, "_is_asked", lambda: True)  # somebody asks all day
    if status == "validating":
        monkeypatch.setattr("edge_runtime.server.batches.runner.OPEN_BATCHES", 0)  # others were there first
    made = start(ai, request("a"), request("b"), completion_window="1h")
    if status == "in_progress":
        end = time.monotonic() + 60
        while ai.batches.retrieve(made.id).status != status:
            assert time.monotonic() < end
            time.sleep(0.02)
    monkeypatch.setattr("edge_runtime.server.batches.runner.time.time", lambda now=time.time: now() + 3601)
    done = ended(ai, made.id)
    assert (done.status, done.output_file_id, done.request_counts.total) == ("expired", None, 2)
    assert [line["error"]["code"] for line in content(ai, done.error_file_id)] == ["batch_expired"] * 2


def test_only_the_key_that_made_it_sees_it(ai, served):
    made = start(ai, request("a"))
    ended(ai, made.id)
    with openai_client(served) as other:
        other = other.with_options(api_key="another")
        assert [*other.files.list()] == []
        assert [*other.batches.list()] == []
        for ask in (lambda: other.files.content(made.input_file_id), lambda: other.batches.retrieve(made.id)):
            with pytest.raises(openai.NotFoundError):
                ask()


def test_a_second_server_on_the_same_folder_is_refused(ai, served, serve):
    upload(ai, b"{}\n")
    with openai_client(serve()) as second, pytest.raises(openai.InternalServerError, match="Another server"):
        second.files.list()
    assert len([*ai.files.list()]) == 1


def test_metrics(ai, served):
    ended(ai, start(ai, request("a"), request("b", messages="none")).id)
    text = served.state.metrics.text().decode()
    assert 'edge_runtime_batches{status="completed"} 1.0' in text
    assert 'edge_runtime_batch_lines_total{result="answer"} 1.0' in text
    assert 'edge_runtime_batch_lines_total{result="error"} 1.0' in text
    assert "edge_runtime_time_to_first_token_seconds_count" not in text, "nobody waited for this answer"
