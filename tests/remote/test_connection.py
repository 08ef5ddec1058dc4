"""Addresses and keys, retries, timeouts, cancelling, and connections that break."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
import time

import pytest

from edge_runtime import EndpointError, MessageError, Model, RemoteModel
from edge_runtime.remote import connection
from edge_runtime.remote.address import Address, parse_address
from edge_runtime.remote.exchange import retry_after_s
from support.fake_servers import Handler, chunk, chunks, fake, refuse, say, tear


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait between attempts, and know no key."""
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.001)
    for name in ("EDGE_RUNTIME_ENDPOINT_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("written", "base", "root"),
    [
        ("http://a:8000", "http://a:8000/v1", "http://a:8000"),
        ("http://a:8000/", "http://a:8000/v1", "http://a:8000"),
        ("a:8000", "http://a:8000/v1", "http://a:8000"),
        ("https://a/v1/", "https://a/v1", "https://a"),
        ("https://a/v1/chat/completions", "https://a/v1", "https://a"),
        ("https://a/llm", "https://a/llm/v1", "https://a/llm"),
        ("https://a/v1beta/openai", "https://a/v1beta/openai", "https://a"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_addresses_as_people_write_them(written, base, root):
    found = parse_address(written)
    assert (str(found), found.root) == (base, root)


@pytest.mark.parametrize(
    "written",
    [
        *("http://me:secret@a/v1", "me:secret@a", "http://secret@a", "ftp://a", "http://", "", "http://a:99999"),
        *("http://a/v1?key=secret", "http://a/v1#secret", "http://[::1", "a b"),
    ],
)
def test_other_addresses_are_refused_without_their_password(written):
    with pytest.raises(MessageError) as caught:
        parse_address(written)
    assert "secret" not in str(caught.value)


def test_which_key_goes_where(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    assert parse_address("https://api.openai.com/v1").key == "sk-openai"
    assert parse_address("https://example.org/v1").key is None
    monkeypatch.setenv("EDGE_RUNTIME_ENDPOINT_KEY", "sk-own\n")
    assert parse_address("https://example.org/v1").key == "sk-own"
    assert parse_address("https://example.org/v1", key="sk-given").key == "sk-given"
    with pytest.raises(MessageError, match="blanks") as caught:
        parse_address("https://example.org/v1", key="sk given")
    assert "sk" not in str(caught.value)


def test_keys_are_shown_nowhere(caplog, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_ENDPOINT_KEY", "sk-very-secret")
    caplog.set_level(logging.DEBUG)
    with fake("vllm", refuse(401, "Bad key sk-very-secret")) as server, Model.connect(server.url) as model:
        with pytest.raises(EndpointError, match="wants a key, and the one that was sent is refused") as caught:
            model.chat("?")
        assert all(headers["Authorization"] == "Bearer sk-very-secret" for _, headers, _ in server.seen)
        shown = [str(caught.value), repr(model), repr(parse_address(server.url)), caplog.text, repr(vars(model))]
        assert not any("sk-very-secret" in text for text in shown)


def test_a_key_without_encryption_is_worth_a_warning():
    assert Address(parse_address("http://example.org").base, "k").warnings()
    for url in ("https://example.org", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost"):
        assert parse_address(url, key="k").warnings() == []
    assert parse_address("http://example.org").warnings() == []


def redirect(status: int, where: str):
    return lambda handler: handler.reply(status, {}, Location=where)


def test_redirects_stay_on_the_host():
    with fake("vllm") as other, fake("vllm") as server, Model.connect(server.url, key="sk-key") as model:
        server.script[:] = [redirect(307, f"{other.url}/v1/chat/completions")]
        with pytest.raises(EndpointError, match="which is not followed"):
            model.chat("?")
        assert other.seen == []
        server.script[:] = [redirect(302, "/v1/chat/completions")]
        with pytest.raises(EndpointError, match="which is not followed"):
            model.chat("?")
        server.script[:] = [redirect(308, "/v1/chat/completions"), say("Yes")]
        assert model.chat("?").answer == "Yes"
        server.script[:] = [redirect(308, "/v1/chat/completions")]
        with pytest.raises(EndpointError, match="more than 3 times"):
            model.chat("?")


@pytest.mark.parametrize(
    "trouble", [tear(), tear(": ping\n\n"), refuse(503), refuse(429, Retry_After="0"), refuse(502)]
)
def test_what_may_pass_is_tried_again(trouble):
    with fake("vllm", trouble, trouble, say("Yes")) as server, Model.connect(server.url) as model:
        assert model.chat("?").answer == "Yes"
        assert len(server.asked) == 3


def test_attempts_end():
    with fake("vllm", refuse(503, "loading")) as server, Model.connect(server.url, retries=2) as model:
        with pytest.raises(EndpointError, match=r"no answer now \(status 503\): loading") as caught:
            model.chat("?")
        assert (len(server.asked), caught.value.may_pass, caught.value.status) == (3, True, 503)


def test_a_server_that_asks_to_wait_for_long_is_not_waited_for():
    with fake("vllm", refuse(429, Retry_After="3600")) as server, Model.connect(server.url) as model:
        with pytest.raises(EndpointError, match="asks to wait 3600 s"):
            model.chat("?")
        assert len(server.asked) == 1


def test_waits_grow_and_are_obeyed(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT_S", 0.5)
    assert all(0.25 * 2**n <= connection._wait_s(n, None) <= 0.5 * 2**n for n in range(5))
    assert connection._wait_s(50, None) <= connection.MAX_WAIT_S
    assert 7 <= connection._wait_s(0, 7.0) <= 7.5
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after_s(text) for text in (None, "", "soon", "-1")] == [None, None, None, 0]


@pytest.mark.parametrize("streams", [True, False])
def test_a_break_in_mid_answer_says_what_arrived(streams):
    seen: list[str] = []

    def ask(model: RemoteModel) -> None:
        seen.extend(piece.text for piece in model.chat("?", stream=True)) if streams else model.chat("?")

    torn = tear(chunk(content="Half "), chunk(content="an ans"))
    with fake("vllm", torn) as server, Model.connect(server.url) as model:
        with pytest.raises(EndpointError, match="after 11 characters: 'Half an ans'") as caught:
            ask(model)
        assert (caught.value.received, caught.value.may_pass, len(server.asked)) == ("Half an ans", True, 1)


def ends_early(handler: Handler) -> None:
    handler.begin()
    handler.send(chunk(content="Half"))
    handler.wfile.write(b"0\r\n\r\n")


def test_an_answer_without_an_end_is_an_error():
    with (
        fake("vllm", ends_early) as server,
        Model.connect(server.url) as model,
        pytest.raises(EndpointError, match="without saying why, after 4 characters: 'Half'"),
    ):
        model.chat("?")


def test_errors_inside_a_stream():
    error = {"error": {"message": "out of memory", "code": 400}}
    with fake("vllm", chunks(error)) as server, Model.connect(server.url) as model:
        with pytest.raises(EndpointError, match="out of memory"):
            model.chat("?")
        server.script[:] = [chunks(chunk(content="Half"), error)]
        with pytest.raises(EndpointError, match="out of memory, after 4 characters: 'Half'") as caught:
            model.chat("?")
        assert caught.value.received == "Half"
        server.script[:] = [chunks(chunk(content="Half"), chunk("content_filter"))]
        with pytest.raises(EndpointError, match="a filter of the server stopped it, after 4 characters"):
            model.chat("?")


@pytest.mark.parametrize(
    "odd", ["data: nonsense\n\n", "data: [1]\n\n", 'data: {"choices": 3}\n\n', 'data: {"choices": [4]}\n\n']
)
def test_nonsense_is_named(odd):
    with (
        fake("vllm", chunks(odd)) as server,
        Model.connect(server.url) as model,
        pytest.raises(EndpointError, match="is it a server with OpenAI's API"),
    ):
        model.chat("?")


def test_a_server_that_does_not_stream():
    whole = {"choices": [{"message": {"content": "Yes", "reasoning": "Hm"}, "finish_reason": "stop"}]}
    with fake("vllm", lambda handler: handler.reply(200, whole)) as server, Model.connect(server.url) as model:
        answer = model.chat("?")
        assert (answer.answer, answer.reasoning, answer.completion_tokens) == ("Yes", "Hm", 0)


def test_text_with_the_line_ends_of_other_standards():
    text = "a\u2028b\x0bc\x85d"
    with fake("vllm", say(text)) as server, Model.connect(server.url) as model:
        assert model.chat("?").answer == text


class Stalls:
    """Sends some chunks and then nothing; knows when the client has hung up."""

    def __init__(self, *before: object) -> None:
        self.before, self.is_gone, self.has_begun = before, threading.Event(), threading.Event()

    def __call__(self, handler: Handler) -> None:
        handler.begin()
        for each in self.before:
            handler.send(each)
        self.has_begun.set()
        handler.connection.settimeout(60)
        with contextlib.suppress(OSError):
            assert handler.connection.recv(1) == b""
        self.is_gone.set()
        handler.close_connection = True


def test_silence_has_an_end():
    stalls = Stalls(chunk(content="Half"))
    with fake("vllm", stalls) as server, Model.connect(server.url, between_s=0.2) as model:
        with pytest.raises(EndpointError, match=r"sent nothing for 0.2 s, after 4 characters: 'Half'"):
            model.chat("?")
        assert stalls.is_gone.wait(30)
    with fake("vllm", Stalls()) as server, Model.connect(server.url, first_token_s=0.2) as model:
        with pytest.raises(EndpointError, match=r"sent nothing for 0.2 s, before any text"):
            model.chat("?")
        assert len(server.asked) == 1  # it may be at work: another request would double that


def test_cancelling_closes_the_connection():
    stalls = Stalls(chunk(content="Half"))
    with fake("vllm", stalls) as server, Model.connect(server.url) as model:
        stream = model.chat("?", stream=True)
        assert next(stream).text == "Half"
        stream.cancel()
        answer = stream.result()
        assert (answer.answer, answer.finish_reason) == ("Half", "cancelled")
        assert stalls.is_gone.wait(30)


def test_dropping_a_stream_closes_the_connection():
    stalls = Stalls()
    with fake("vllm", stalls) as server, Model.connect(server.url) as model:
        stream = model.chat("?", stream=True)
        assert stalls.has_begun.wait(30)
        del stream
        gc.collect()
        assert stalls.is_gone.wait(30)


def test_closing_ends_answers_and_refuses_more():
    stalls = Stalls()
    with fake("vllm", stalls) as server:
        model = Model.connect(server.url)
        stream = model.chat("?", stream=True)
        assert stalls.has_begun.wait(30)
        model.close()
        assert stream.result().finish_reason == "cancelled"
        with pytest.raises(MessageError, match="was closed"):
            model.chat("?")


def test_in_an_event_loop():
    async def ask() -> None:
        assert (await model.achat("?")).answer == "Hello there"
        assert [piece.text async for piece in model.achat("?")] == ["Hello", " there"]
        server.script[:] = [stalls]
        task = asyncio.ensure_future(model.achat("?")._whole())
        assert await asyncio.to_thread(stalls.has_begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(stalls.is_gone.wait, 30)

    stalls = Stalls()
    with fake("vllm") as server, Model.connect(server.url) as model:
        asyncio.run(ask())


def test_requests_run_in_parallel_up_to_the_limit():
    together, most = threading.Barrier(3, timeout=30), []

    def meet(handler: Handler) -> None:
        together.wait()
        say("Yes")(handler)

    with fake("vllm", meet) as server, Model.connect(server.url, parallel=3) as model:
        assert [str(answer) for answer in model.chat_n("?", 6)] == ["Yes"] * 6
    running, lock = [0], threading.Lock()

    def count(handler: Handler) -> None:
        with lock:
            running[0] += 1
            most.append(running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        say("Yes")(handler)

    with fake("vllm", count) as server, Model.connect(server.url, parallel=2) as model:
        assert len(model.chat_n("?", 6)) == 6
    assert max(most) <= 2


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EndpointError, match="cannot be reached") as caught:
            Model.connect(url, retries=1)
    assert caught.value.may_pass


@pytest.mark.parametrize(
    "wrong", [{"retries": -1}, {"parallel": 0}, {"between_s": 0}, {"connect_s": "1"}, {"parallel": 1.5}]
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(MessageError, match=next(iter(wrong))):
        Model.connect("http://127.0.0.1:9", **wrong)


def test_unknown_dialects():
    with fake("vllm") as server, pytest.raises(MessageError, match="The dialect is 'latin'; expected one of"):
        Model.connect(server.url, dialect="latin")
