"""Open WebUI beside the demo model, in a real browser: a picture, a streamed answer, a stop, a second chat, a title.

Both servers listen on this machine only and have their own folders, which are deleted at the end. Open WebUI is set
to fetch nothing. Its package has 3 GB and needs an environment of its own (`make open-webui` makes it), so this is
not part of the tests.

    .venv/bin/python tools/open_webui.py --open-webui build/open-webui/bin/open-webui --pictures build/open-webui/seen

Every step prints what it saw; the exit code is 1 when one fails. The pictures show the browser after each step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Locator, Page, sync_playwright

SIGN = Path(__file__).parents[1] / "examples" / "sign.png"
START_S, ANSWER_MS = 600, 300_000  # importing Open WebUI alone takes minutes on a busy machine
LONG_ITEMS = 300
LONG = {
    "type": "array",
    "items": {"enum": [*"abcdefghijkl"]},
    "minItems": LONG_ITEMS,
    "maxItems": LONG_ITEMS,
}
"""The demo's answers are short; this schema forces a long one, about 3000 tokens."""


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def settings(folder: Path, backend: str, address: str) -> dict[str, str]:
    """Environment of Open WebUI: one user without a password, nothing fetched."""
    return {
        **os.environ,
        "DATA_DIR": str(folder),
        "OLLAMA_BASE_URL": backend,
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "of one run",
        "CORS_ALLOW_ORIGIN": address,
        "ENABLE_OPENAI_API": "False",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "False",
        "ENABLE_COMMUNITY_SHARING": "False",
        "RAG_EMBEDDING_ENGINE": "ollama",  # otherwise it fetches a model from a hub
        "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
        "ANONYMIZED_TELEMETRY": "False",
        "DO_NOT_TRACK": "True",
    }


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str], log: Path, health: str) -> Iterator[None]:
    """Run a server until the block ends."""
    with (
        log.open("w") as stream,
        subprocess.Popen(command, env=environment, cwd=log.parent, stdout=stream, stderr=subprocess.STDOUT) as child,
    ):
        try:
            deadline = time.monotonic() + START_S
            while not _answers(health):
                if child.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} does not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield
        finally:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Chat:
    """The page, used as a person would."""

    def __init__(self, page: Page, address: str, backend: str, pictures: Path) -> None:
        self.page, self._address, self._backend, self._pictures = page, address, backend, pictures
        self._n_pictures = 0

    def open(self, model: str | None = None) -> None:
        """Open a new chat."""
        self.page.goto(f"{self._address}/" + (f"?models={model}" if model else ""), timeout=ANSWER_MS)
        self.page.wait_for_selector("#chat-input", timeout=ANSWER_MS)
        news = self.page.get_by_role("button", name="Okay, Let's Go!")
        self.page.wait_for_timeout(1500)
        if news.count():
            news.first.click()
        self.page.get_by_label(f"Selected model: {model or 'demo:latest'}").wait_for(timeout=ANSWER_MS)

    def call(self, path: str, body: dict[str, Any]) -> Any:
        """Call Open WebUI's own API, as the page does."""
        script = """async ([path, body]) => {
            const headers = {"Authorization": `Bearer ${localStorage.token}`, "Content-Type": "application/json"};
            const reply = await fetch(path, {method: "POST", headers, body: JSON.stringify(body)});
            return [reply.status, await reply.text()];
        }"""
        status, text = self.page.evaluate(script, [path, body])
        assert status == 200, f"{path}: {status} {text}"
        return json.loads(text)

    def ask(self, text: str, picture: Path | None = None) -> None:
        """Type a question and send it."""
        if picture is not None:
            self.page.locator("input[type=file]").first.set_input_files(picture)
            self.page.get_by_label("Remove file").wait_for(timeout=ANSWER_MS)
        self.page.click("#chat-input")
        self.page.keyboard.type(text)
        self.page.click("#send-message-button")

    @property
    def answer(self) -> Locator:
        """The last answer."""
        return self.page.locator(".chat-assistant").last

    @property
    def stop(self) -> Locator:
        """The button that stops an answer; visible while one is generated."""
        return self.page.get_by_role("button", name="Stop", exact=True)

    def finished(self) -> str:
        """Wait for the end of the answer, and return it."""
        self.answer.wait_for(timeout=ANSWER_MS)
        self.stop.wait_for(state="hidden", timeout=ANSWER_MS)  # once the title has arrived, too
        return self.answer.inner_text().strip()

    def requests(self, status: str) -> int:
        """Number of requests with this status that the model's server has counted."""
        text = httpx.get(f"{self._backend}/metrics", timeout=60, trust_env=False).text
        found = re.search(rf'^edge_runtime_requests_total{{[^}}]*status="{status}"}} (\S+)$', text, re.MULTILINE)
        return round(float(found[1])) if found else 0

    def show(self, name: str) -> None:
        """Take a screenshot of the browser."""
        self._n_pictures += 1
        self.page.screenshot(path=self._pictures / f"{self._n_pictures}-{name}.png")


def until(what: str, holds: Callable[[], bool], seconds: float = ANSWER_MS / 1000) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


def tools_refusal(chat: Chat) -> str:
    """A fresh installation sends 36 tools, which the demo has no room for: it says so."""
    chat.open()
    chat.ask("What does it say?", SIGN)
    chat.page.get_by_text(re.compile(r"The prompt has .* 36 tools")).first.wait_for(timeout=ANSWER_MS)
    chat.show("tools")
    chat.call(
        "/api/v1/configs/models",
        {
            "DEFAULT_MODELS": None,
            "DEFAULT_PINNED_MODELS": None,
            "MODEL_ORDER_LIST": None,
            "DEFAULT_MODEL_METADATA": {"capabilities": {"builtin_tools": False}},
        },
    )
    return "refused with their share; switched off now"


def picture(chat: Chat) -> str:
    """A picture is read."""
    chat.open()
    chat.ask("What does it say?", SIGN)
    said = chat.finished()
    chat.show("picture")
    assert said == "CAFE", f"it says {said!r}, expected CAFE"
    return said


def title(chat: Chat) -> str:
    """Open WebUI asks for a title beside the answer; whatever the demo calls it, the request is answered."""
    until("the title's request", lambda: chat.requests("ok") > 1)
    chat.page.get_by_label("Open Sidebar").first.click()
    chat.page.wait_for_timeout(1000)
    chat.show("title")
    called = chat.page.title().split(" • ")[0].split(" / ")[0]
    assert called != "New Chat", "the chat has no title"
    return f"{chat.requests('ok')} requests were answered, the chat is called {called!r}"


def streamed(chat: Chat) -> str:
    """An answer grows while it is made."""
    chat.call(
        "/api/v1/models/create",
        {
            "id": "talkative",
            "base_model_id": "demo:latest",
            "name": "talkative",
            "meta": {"capabilities": {"builtin_tools": False}},
            "params": {"format": json.dumps(LONG), "temperature": 50.0, "top_k": 0, "top_p": 1.0, "seed": 3,
                       "num_predict": 3500},
        },
    )  # fmt: skip
    chat.open("talkative")
    chat.ask("ab")
    lengths: list[int] = []
    chat.answer.wait_for(timeout=ANSWER_MS)
    deadline = time.monotonic() + ANSWER_MS / 1000
    while len({*lengths} - {0}) < 5 and time.monotonic() < deadline:
        lengths.append(len(chat.answer.inner_text().strip()))
        time.sleep(0.05)
    grown = sorted({*lengths} - {0})
    assert len(grown) >= 5, f"the answer was seen at the lengths {grown} alone"
    chat.show("streamed")
    return f"seen at {', '.join(map(str, grown))} characters"


def stopped(chat: Chat) -> str:
    """The stop button ends it, for the engine too."""
    chat.stop.click()
    chat.stop.wait_for(state="hidden", timeout=ANSWER_MS)
    chat.page.wait_for_timeout(1000)
    before = len(chat.answer.inner_text())
    chat.page.wait_for_timeout(2000)
    after = len(chat.answer.inner_text())
    chat.show("stopped")
    assert before == after, f"it went on from {before} to {after} characters"
    until("the engine leaves it", lambda: chat.requests("cancelled") == 1)
    return f"{after} characters"


def second(chat: Chat) -> str:
    """A second chat, of two turns."""
    chat.open("demo:latest")
    chat.ask("What does it say?", SIGN)
    first = chat.finished()
    chat.ask("What does it say?")
    until("the second answer", lambda: chat.page.locator(".chat-assistant").count() == 2)
    again = chat.finished()
    chat.show("second")
    assert first == "CAFE", f"it says {first!r}, expected CAFE"
    return f"{first}, then {again}"


STEPS = (tools_refusal, picture, title, streamed, stopped, second)


def run(options: argparse.Namespace, folder: Path) -> int:
    """Run all steps; return the number of failures."""
    ours, theirs = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    host = ["--host", "127.0.0.1", "--port"]
    serve = [sys.executable, "-m", "edge_runtime", "serve", *host, ours.rsplit(":", 1)[1], "-m", "demo"]
    serve += ["--cache-dir", str(folder / "cache")]
    environment = {**os.environ, "EDGE_RUNTIME_MODELS": str(folder / "models")}
    webui = [str(options.open_webui.absolute()), "serve", *host, theirs.rsplit(":", 1)[1]]
    (folder / "data").mkdir()
    failed = 0
    with (
        server(serve, environment, folder / "edge-runtime.log", f"{ours}/health"),
        server(webui, settings(folder / "data", ours, theirs), folder / "open-webui.log", f"{theirs}/health"),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        chat = Chat(page, theirs, ours, options.pictures)
        for step in STEPS:
            name = (step.__doc__ or "").split(":")[0].rstrip(".")
            try:
                print(f"ok      {name}: {step(chat)}", flush=True)
            except Exception as error:  # noqa: BLE001 - the other steps still run
                failed += 1
                print(f"FAILED  {name}: {error}", flush=True)
                chat.show("failed")
        browser.close()
    for log in folder.glob("*.log"):
        shutil.copy(log, options.pictures)
    return failed


def main() -> None:
    """Run the steps and print how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--open-webui", type=Path, required=True, metavar="PROGRAM", help="open-webui of its package")
    parser.add_argument("--chromium", default=shutil.which("chromium"), metavar="PROGRAM")
    parser.add_argument("--pictures", type=Path, default=Path("build/open-webui/seen"), metavar="DIR")
    options = parser.parse_args()
    options.pictures = options.pictures.absolute()
    options.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        failed = run(options, Path(folder))
    print(f"{len(STEPS) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
