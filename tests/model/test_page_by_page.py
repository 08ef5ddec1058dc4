"""Every page by itself: one answer each, in flat memory, whatever happens to single pages; and presets."""

from __future__ import annotations

import gc
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime import EdgeRuntimeError, ImageError, MessageError, Model, PageAnswer, each_page, join_pages
from edge_runtime.cli.document_options import PRESET_NAMES
from edge_runtime.cli.program import main
from edge_runtime.inputs.documents import DocumentOptions, with_pages
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.messages import ImagePart, Message, parse_messages
from edge_runtime.inputs.presets import PRESETS, with_preset
from edge_runtime.page_by_page import without_fence
from edge_runtime.system.memory import give_back
from edge_runtime.weights.config import SlicingConfig
from support.document_maker import pages_tiff, scanned_pdf, words_pdf, written_pdf

QUESTION = "What does it say?"
WORDS = ["CAFE", "TAXI", "HELLO"]
DAMAGED = written_pdf([b""] * 3).replace(b"5 0 obj<</Type/Page/", b"5 0 obj<</Type/None/")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.pdf"
    path.write_bytes(words_pdf(WORDS))
    return path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["run", *arguments, "--greedy"])


# --- in Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "bytes", "file", "part"])
def test_one_answer_for_each_page(demo: Model, scan: Path, form: str) -> None:
    data = scan.read_bytes()
    source = {"path": scan, "bytes": data, "file": io.BytesIO(data), "part": {"type": "pdf", "pdf": data}}[form]
    found = list(each_page(demo, [source, QUESTION], greedy=True))
    assert [(page.file, page.page, page.text) for page in found] == [(0, i + 1, word) for i, word in enumerate(WORDS)]
    assert join_pages([page.text for page in found]) == "CAFE\n\nTAXI\n\nHELLO"


def test_pages_come_as_they_are_answered(demo: Model, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, submit = [], Model.submit
    monkeypatch.setattr(Model, "submit", lambda *given, **options: asked.append(given) or submit(*given, **options))
    pages = each_page(demo, [scan, QUESTION], pages="3,1", greedy=True)
    assert next(pages).text == "HELLO"
    assert len(asked) == 1
    assert [page.page for page in pages] == [1]


def test_several_documents_and_pictures_with_text_around_them(demo: Model, scan: Path, monkeypatch: Any) -> None:
    seen: list[Message] = []

    def submit(self: Model, messages: list[Any], **options: Any) -> Any:
        seen.append(messages[-1])
        assert messages[0] == {"role": "system", "content": "Be brief."}
        raise ImageError("not today")

    monkeypatch.setattr(Model, "submit", submit)
    tiff = pages_tiff([Image.new("RGB", (30, 30), (i, 0, 0)) for i in range(2)])
    content = ["Look:", scan, "then", tiff, Image.new("RGB", (9, 9)), "What?"]
    found = list(each_page(demo, content, before=[{"role": "system", "content": "Be brief."}]))
    assert [(page.file, page.page) for page in found] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
    assert [page.error for page in found] == ["not today"] * 6
    texts = [[part if isinstance(part, str) else "page" for part in message.parts] for message in seen]
    assert texts[0] == ["Look:", "page", "then", "What?"]
    assert texts[3] == texts[5] == ["Look:", "then", "page", "What?"]


def test_a_damaged_page_costs_its_own_answer_only(demo: Model) -> None:
    first, second, third = each_page(demo, [DAMAGED, "What?"], max_tokens=1)
    assert first.answer is not None
    assert third.answer is not None
    assert second.answer is None
    assert second.error is not None
    assert "Page 2" in second.error
    assert second.text == ""


@pytest.mark.parametrize(
    "content, reason",
    [
        (["What?"], "no document and no picture"),
        ([b"%PDF-1.7", "q"], "not a readable PDF"),
        ([Path("absent.pdf"), "q"], "absent.pdf does not exist"),
    ],
)
def test_what_can_never_be_answered_is_raised(demo: Model, content: list[Any], reason: str) -> None:
    with pytest.raises(EdgeRuntimeError, match=reason):
        list(each_page(demo, content))


def test_joined_pages() -> None:
    assert join_pages(["\n# A\n\n", "", "   ", "b  \n"]) == "# A\n\nb"
    assert join_pages([]) == ""


@pytest.mark.parametrize(
    "text, expected",
    [
        ("```markdown\n# A\n| b |\n```", "# A\n| b |"),
        ("```md\n# A\n```\n", "# A"),
        ("```\nplain\n```", "plain"),
        ("```python\nprint()\n```", "```python\nprint()\n```"),
        ("# A\n```\ncode\n```", "# A\n```\ncode\n```"),
        ("```\none\n```\ntwo\n```\nthree\n```", "```\none\n```\ntwo\n```\nthree\n```"),
        ("    indented", "    indented"),
    ],
)
def test_fences_around_a_whole_page_are_taken_off(text: str, expected: str) -> None:
    assert without_fence(text) == expected


def anonymous_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_two_hundred_pages_in_flat_memory(demo: Model, tmp_path: Path) -> None:
    """Two hundred scans, each another picture; held on to, they would be 15 MB of JPEG and 140 MB of pixels."""
    path = tmp_path / "book.pdf"
    path.write_bytes(scanned_pdf(200))
    assert path.stat().st_size > 10e6
    drawn, answered = [], []

    def on_image(done: int, total: int) -> None:
        drawn.append(anonymous_kb())

    options: dict[str, Any] = {"max_slices": 1, "max_tokens": 1, "greedy": True, "on_image": on_image}
    for number, page in enumerate(each_page(demo, [path, "What?"], **options), 1):
        assert page.answer is not None, page.error
        assert page.page == number
        if number % 20 == 0:
            gc.collect()
            give_back()
            answered.append(anonymous_kb())
    assert len(drawn) == 200
    told = ", ".join(f"{kb / 1e3:.1f}" for kb in answered)
    print(f"RssAnon in MB after every 20th page: {told}; most while a page was drawn: {max(drawn) / 1e3:.1f}")
    settled = answered[1]  # caches of visual tokens and of compiled kernels have filled up
    assert max(answered[2:]) - settled < 10_000
    assert max(drawn[40:]) - settled < 20_000


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_pages_below_each_other(scan: Path) -> None:
    result = run(str(scan), "--each-page", QUESTION)
    assert (result.exit_code, result.stdout) == (0, "CAFE\n\nTAXI\n\nHELLO\n")


def test_the_command_prints_one_json_object(scan: Path) -> None:
    result = run(str(scan), "--each-page", QUESTION, "--json", "--pages", "2-3")
    found = json.loads(result.stdout)
    assert found["text"] == "TAXI\n\nHELLO"
    assert [(page["file"], page["page"], page["answer"]) for page in found["pages"]] == [
        (str(scan), 2, "TAXI"),
        (str(scan), 3, "HELLO"),
    ]
    assert found["pages"][0]["prompt_tokens"] > 0
    assert "logprobs" not in found["pages"][0]


def test_a_page_that_cannot_be_read_is_told_and_the_rest_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pdf"
    path.write_bytes(DAMAGED)
    result = run(str(path), "--each-page", "What?", "--json", "--max-tokens", "1")
    assert result.exit_code == 1
    assert "edge-runtime: Page 2 of " in result.stderr
    errors = [page["error"] for page in json.loads(result.stdout)["pages"]]
    assert [error is None for error in errors] == [True, False, True]


def test_stopping_between_pages_keeps_what_is_there(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.inputs.pdf import PdfFile

    draw, drawn = PdfFile.draw, []

    def interrupted(self: PdfFile, index: int, scale: float) -> Image.Image:
        drawn.append(index)
        if index == 1:
            raise KeyboardInterrupt
        return draw(self, index, scale)

    monkeypatch.setattr(PdfFile, "draw", interrupted)
    result = run(str(scan), "--each-page", QUESTION)
    assert (result.exit_code, result.stdout) == (130, "CAFE\n")
    assert drawn == [0, 1]


@pytest.mark.parametrize(
    "arguments", [["--each-page"], ["--each-page", "--draw", "out.png", "What?"], ["--each-page", "What?"]]
)
def test_each_page_needs_a_question_and_a_page(arguments: list[str], scan: Path) -> None:
    files = [] if arguments[-1] == "What?" and len(arguments) == 2 else [str(scan)]
    result = run(*files, *arguments)
    assert result.exit_code in (1, 2)
    assert "--each-page needs a question" in result.stderr or "no document and no picture" in result.stderr


def test_a_chat_takes_documents(scan: Path) -> None:
    lines = f"/image {scan}\n{QUESTION}\n/image absent.pdf\n"
    result = CliRunner().invoke(main, ["run", "--greedy", "--pages", "2"], input=lines)
    assert (result.exit_code, result.stdout) == (0, "TAXI\n")
    assert "scan.pdf (1 page) goes with the next question" in result.stderr
    assert "absent.pdf does not exist" in result.stderr


def test_a_password_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reportlab.lib.pdfencrypt import StandardEncryption

    path = tmp_path / "locked.pdf"
    path.write_bytes(words_pdf(["TAXI"], encrypt=StandardEncryption("sesame")))
    assert run(str(path), QUESTION, "--password", "sesame").stdout == "TAXI\n"
    monkeypatch.setenv("EDGE_RUNTIME_PASSWORD", "sesame")
    assert run(str(path), QUESTION).stdout == "TAXI\n"


def test_places_are_drawn_onto_the_page_that_was_looked_at(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime.cli import terminal as console

    whole, out = console.answer, tmp_path / "found.png"
    named = "<box>250 250 750 750</box>"
    monkeypatch.setattr(console, "answer", lambda *given, **rest: replace(whole(*given, **rest), answer=named))
    result = run(str(scan), "Where?", "--pages", "1,2", "--draw", str(out), "--max-tokens", "1")
    assert result.exit_code == 0
    assert "1 place drawn" in result.stderr
    (page,) = with_pages(
        parse_messages([{"role": "user", "content": [scan]}]), DocumentOptions(pages="2"), demo_slicing()
    )[0].parts
    assert isinstance(page, ImagePart)
    expected, drawn = load_image(page.source), load_image(out)
    assert drawn.size == expected.size
    corner = (0, 0, drawn.width // 5, drawn.height)
    assert drawn.crop(corner).tobytes() == expected.crop(corner).tobytes()
    assert drawn.tobytes() != expected.tobytes()


def demo_slicing() -> SlicingConfig:
    return SlicingConfig(112, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- presets ----------------------------------------------------------------------------------------------------


def parts_of(content: list[Any], name: str) -> list[str]:
    (message,) = with_preset(parse_messages([{"role": "user", "content": content}]), name)
    return [part if isinstance(part, str) else "picture" for part in message.parts]


def test_presets_stand_where_their_recipe_has_them() -> None:
    picture = Image.new("RGB", (9, 9))
    ocr, markdown = PRESETS["ocr"].text, PRESETS["markdown"].text
    assert parts_of([picture], "ocr") == ["picture", ocr]
    assert parts_of([picture, "Only the address."], "ocr") == ["picture", ocr, "Only the address."]
    assert parts_of(["Only this:", picture], "ocr") == [ocr, "Only this:", "picture"]
    assert parts_of([picture, picture], "markdown") == [markdown, "picture", "picture"]
    assert ocr == "What is the text in the picture?"


def test_a_preset_asks_in_the_last_message_of_the_user() -> None:
    picture = ImagePart(Image.new("RGB", (9, 9)))
    first, answer, last = Message("user", ("a",)), Message("assistant", ("b",)), Message("user", (picture,))
    assert with_preset([first, answer, last], "caption")[:2] == [first, answer]
    with pytest.raises(MessageError, match="expected one of ocr, markdown, table, caption"):
        with_preset([last], "sonnet")
    with pytest.raises(MessageError, match="add a picture"):
        with_preset([answer], "ocr")


def test_a_preset_is_the_question_it_stands_for(demo: Model) -> None:
    assert tuple(PRESETS) == PRESET_NAMES
    picture = Image.open(Path(__file__).parents[2] / "examples" / "sign.png")
    for name, preset in PRESETS.items():
        content = [preset.text, picture] if preset.stands_first else [picture, preset.text]
        expected = demo.build_prompt([{"role": "user", "content": content}])
        asked = demo.build_prompt([{"role": "user", "content": [picture]}], preset=name)
        assert asked.ids == expected.ids


def test_the_command_asks_a_preset_without_a_question(scan: Path) -> None:
    seen = run(str(scan), "--preset", "ocr", "--pages", "1", "--json", "--max-tokens", "1")
    assert seen.exit_code == 0
    assert json.loads(seen.stdout)["prompt_tokens"] > 0
    pages = run(str(scan), "--preset", "markdown", "--each-page", "--json", "--max-tokens", "1")
    found = json.loads(pages.stdout)["pages"]
    assert len(found) == 3
    assert run(str(scan), "--preset", "sonnet").exit_code == 2


def test_an_answer_of_a_page_has_text_or_a_reason() -> None:
    assert PageAnswer(0, 1, None, "why not").text == ""
