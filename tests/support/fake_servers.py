"""Strict stand-ins for servers with OpenAI's API: a field that the real one does not document is refused.

Fields: vLLM's `ChatCompletionRequest` (entrypoints/openai/chat_completion/protocol.py), SGLang's
(srt/entrypoints/openai/protocol.py) with the parts of its messages, and openai-python's `chat.completions.create`.
Replies have the form of each: vLLM's `reasoning` and `stop_reason`, SGLang's `reasoning_content` and `matched_stop`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPENAI = frozenset(
    [
        "messages",
        "model",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "presence_penalty",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "tools",
        "tool_choice",
        "reasoning_effort",
        "parallel_tool_calls",
        "user",
    ]
)
FIELDS = {
    "openai": OPENAI,
    "vllm": OPENAI
    | frozenset(
        [
            "thinking_token_budget",
            "include_reasoning",
            "use_beam_search",
            "top_k",
            "min_p",
            "repetition_penalty",
            "length_penalty",
            "stop_token_ids",
            "include_stop_str_in_output",
            "ignore_eos",
            "min_tokens",
            "skip_special_tokens",
            "allowed_token_ids",
            "bad_words",
            "echo",
            "add_generation_prompt",
            "continue_final_message",
            "add_special_tokens",
            "chat_template",
            "chat_template_kwargs",
            "media_io_kwargs",
            "mm_processor_kwargs",
            "structured_outputs",
            "priority",
            "request_id",
            "cache_salt",
        ]
    ),
    "sglang": OPENAI
    | frozenset(
        [
            "top_k",
            "min_p",
            "min_tokens",
            "regex",
            "ebnf",
            "repetition_penalty",
            "stop_token_ids",
            "stop_regex",
            "no_stop_trim",
            "ignore_eos",
            "continue_final_message",
            "skip_special_tokens",
            "lora_path",
            "session_params",
            "separate_reasoning",
            "stream_reasoning",
            "chat_template_kwargs",
            "max_dynamic_patch",
            "min_dynamic_patch",
            "rid",
        ]
    ),
}
FIELDS["old vllm"] = (FIELDS["vllm"] - {"structured_outputs", "thinking_token_budget"}) | {
    "guided_json",
    "guided_choice",
    "guided_regex",
    "guided_grammar",
}
PARTS = {
    "openai": {"text": {"text"}, "image_url": {"image_url"}},
    "vllm": {"text": {"text"}, "image_url": {"image_url", "uuid"}, "video_url": {"video_url", "uuid"}},
    "sglang": {"text": {"text"}, "image_url": {"image_url", "modalities"}, "video_url": {"video_url"}},
}
MESSAGES = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"}
STRUCTURED = {"json", "regex", "choice", "grammar", "json_object", "structural_tag"}
VERSIONS = {"vllm": "0.19.0", "old vllm": "0.10.1"}

Respond = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """List the models, or tell the version."""
        self.server.seen.append((self.path, dict(self.headers), None))
        kind = self.server.kind.split()[-1]
        if self.path == "/v1/models":
            owner = {"vllm": "vllm", "sglang": "sglang"}.get(kind, "somebody")
            entry = {"id": "the-model", "object": "model", "owned_by": owner, "max_model_len": 4096}
            self.reply(200, {"object": "list", "data": [entry] * self.server.n_models})
        elif self.path == "/version" and self.server.kind in VERSIONS:
            self.reply(200, {"version": VERSIONS[self.server.kind]})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        """Answer as scripted, after a look at the fields."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        if self.path != "/v1/chat/completions":
            self.reply(404, {"detail": "Not Found"})
            return
        wrong = unknown(body, self.server.kind)
        if wrong is not None:
            self.reply(400, {"error": {"message": f"Extra inputs are not permitted: {wrong}", "code": 400}})
            return
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def reply(self, status: int, body: Any, **headers: str) -> None:
        """Send JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        """Start a stream; it ends with the connection."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, data: Any) -> None:
        """Send one event."""
        text = data if isinstance(data, str) else f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
        raw = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
        self.wfile.flush()

    def end(self) -> None:
        """End the stream."""
        self.send("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def tear(self) -> None:
        """Break the connection off, as a process that dies does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def unknown(body: dict[str, Any], kind: str) -> str | None:
    """The first field that a server does not know."""
    for name in body:
        if name not in FIELDS[kind]:
            return name
    for name in body.get("structured_outputs") or ():
        if name not in STRUCTURED:
            return f"structured_outputs.{name}"
    for message in body["messages"]:
        for name in message.keys() - MESSAGES:
            return f"messages.{name}"
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            known = PARTS[kind.split()[-1]].get(part["type"])
            if known is None:
                return f"messages.content.{part['type']}"
            for name in part.keys() - known - {"type"}:
                return f"messages.content.{name}"
    return None


class FakeServer(ThreadingHTTPServer):
    """A server of one kind on the loopback."""

    daemon_threads = True

    def __init__(self, kind: str, script: list[Respond], n_models: int = 1) -> None:
        self.kind, self.script, self.n_models = kind, script, n_models
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        """Path, headers and body of every request."""
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error here."""

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def asked(self) -> list[Any]:
        """Bodies of the requests for answers."""
        return [body for _, _, body in self.seen if body is not None]


@contextlib.contextmanager
def fake(kind: str, *script: Respond, n_models: int = 1) -> Iterator[FakeServer]:
    """Run a server while the block lasts; the last step of the script is repeated."""
    server = FakeServer(kind, list(script) or [say("Hello", " there")], n_models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chunk(
    reason: str | None = None, *, logprobs: Any = None, ended: dict[str, Any] | None = None, **delta: Any
) -> Any:
    """One chunk of a stream."""
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason, **(ended or {})}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 11,
        "completion_tokens": 5,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    },
}


def chunks(*found: Any) -> Respond:
    """Answer with these chunks and the usage."""

    def respond(handler: Handler) -> None:
        handler.begin()
        handler.send(": comment\n\n")
        for each in (chunk(role="assistant", content=""), *found, USAGE):
            handler.send(each)
        handler.end()

    return respond


def say(*texts: str, reason: str = "stop", **ended: Any) -> Respond:
    """Answer with texts."""
    return chunks(*(chunk(content=text) for text in texts), chunk(reason, ended=ended))


def refuse(status: int, text: str = "no", **headers: str) -> Respond:
    """Answer with an error."""
    return lambda handler: handler.reply(status, {"error": {"message": text, "type": "x", "code": status}}, **headers)


def tear(*before: Any) -> Respond:
    """Break the connection off after some chunks, or before any reply."""

    def respond(handler: Handler) -> None:
        if before:
            handler.begin()
            for each in before:
                handler.send(each)
            handler.close_connection = True  # a reset could overtake what was sent
        else:
            handler.tear()

    return respond
