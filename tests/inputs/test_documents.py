"""Documents, mainly PDF files: the right pages in the right size and order, within limits."""

from __future__ import annotations

import base64
import gc
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_runtime import BackendUnavailable, EdgeRuntimeError, ImageError, MessageError, Model
from edge_runtime.inputs.documents import DocumentOptions, with_pages
from edge_runtime.inputs.image import PIXEL_LIMIT, load_image, picture_size
from edge_runtime.inputs.messages import DocumentPart, ImagePart, parse_messages
from edge_runtime.inputs.pages import choose_pages
from edge_runtime.inputs.pdf import PdfFile, PdfPage, Resolution
from edge_runtime.prompt.build import iter_images
from support.command import refused
from support.document_maker import (
    BLUE,
    COLOURS,
    GREEN,
    RED,
    SLICING,
    coloured_pdf,
    colours,
    pictures,
    words_pdf,
    written_pdf,
)

PDF = coloured_pdf(COLOURS)


QUESTION = "What does it say?"


# --- which pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, expected",
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("1-3,7", [0, 1, 2, 6]),
        (" 2 , 4-5 ", [1, 3, 4]),
        ("6-", [5, 6, 7]),
        ("7,1", [6, 0]),
        ("2,2", [1, 1]),
        (3, [2]),
        ([5, 1], [4, 0]),
        (range(2, 4), [1, 2]),
    ],
)
def test_pages_are_chosen_in_the_order_in_which_they_are_named(choice: Any, expected: list[int]) -> None:
    assert choose_pages(choice, lambda most: 8, "a.pdf", 100) == expected


@pytest.mark.parametrize(
    "choice", ["", "a", "1-2-3", "-3", "3-1", "1,,2", "1.5", "٣", [], [1.5], [True], [None], {}, 2.0, "9" * 10]
)
def test_invalid_choices(choice: Any) -> None:
    with pytest.raises(MessageError, match="expected numbers and ranges such as 1-3,7"):
        choose_pages(choice, lambda most: 8, "a.pdf", 100)


@pytest.mark.parametrize("choice, page", [("9", 9), ("7-9", 9), (0, 0), ([-1], -1), ("0-2", 0), ("12-", 12)])
def test_pages_that_do_not_exist(choice: Any, page: int) -> None:
    with pytest.raises(MessageError, match=rf"Page {page} was asked for, but a.pdf has 8 pages"):
        choose_pages(choice, lambda most: 8, "a.pdf", 100)


def test_more_pages_than_allowed() -> None:
    assert len(choose_pages(None, lambda most: 8, "a.pdf", 8)) == 8
    with pytest.raises(ImageError, match=r"a.pdf has 8 pages, at most 7 are read.*--pages.*--max-pages"):
        choose_pages(None, lambda most: 8, "a.pdf", 7)
    with pytest.raises(ImageError, match=r"read on more than 7 pages, at most 7"):
        choose_pages("1-8", lambda most: 999_999_999, "a.pdf", 7)
    with pytest.raises(ImageError, match="at most 7"):  # without counting to the end first
        choose_pages("1-999999999", lambda most: 999_999_999, "a.pdf", 7)
    for n_pages, said in ((9, "more than 7"), (12, "12")):
        with pytest.raises(ImageError, match=rf"a.pdf has {said} pages, at most 7 are read"):
            choose_pages(None, lambda most, there=n_pages: there, "a.pdf", 7)


# --- PDF --------------------------------------------------------------------------------------------------------


def test_every_page_becomes_a_picture_in_order_with_the_text_around_it() -> None:
    content = ["before", {"type": "pdf", "pdf": PDF}, "between", Image.new("RGB", (9, 9), (1, 2, 3)), "after"]
    assert colours(pictures(content)) == [*COLOURS, (1, 2, 3)]
    (message,) = with_pages(parse_messages([{"role": "user", "content": content}]), DocumentOptions(), SLICING)
    kinds = [part if isinstance(part, str) else "picture" for part in message.parts]
    assert kinds == ["before", "picture", "picture", "picture", "between", "picture", "after"]


@pytest.mark.parametrize(
    "form", ["path", "str path", "bytes", "file", "data URI", "bare path", "bare bytes", "bare file"]
)
def test_every_form_of_a_document(form: str, tmp_path: Path) -> None:
    path = tmp_path / "grüße, welt.pdf"
    path.write_bytes(PDF)
    with path.open("rb") as file:
        sources: dict[str, Any] = {
            "path": {"type": "pdf", "pdf": path},
            "str path": {"type": "pdf", "pdf": str(path)},
            "bytes": {"type": "pdf", "pdf": PDF},
            "file": {"type": "pdf", "pdf": file},
            "data URI": {"type": "pdf", "pdf": "data:application/pdf;base64," + base64.b64encode(PDF).decode()},
            "bare path": path,
            "bare bytes": PDF,
            "bare file": file,
        }
        for _ in range(2):  # a conversation is read again with its next turn, an open file too
            assert colours(pictures([sources[form], "q"])) == COLOURS


@pytest.mark.parametrize("prefix", ["data:application/pdf;base64,", ""])
def test_openai_s_files(prefix: str) -> None:
    data = prefix + base64.b64encode(PDF).decode()
    chat = {"type": "file", "file": {"filename": "a.pdf", "file_data": data}}
    response = {"type": "input_file", "filename": "a.pdf", "file_data": data}
    assert colours(pictures([chat, response])) == COLOURS * 2
    picture = io.BytesIO()
    Image.new("RGB", (5, 5), BLUE).save(picture, "PNG")
    data = prefix.replace("application/pdf", "image/png") + base64.b64encode(picture.getvalue()).decode()
    assert colours(pictures([{"type": "file", "file": {"file_data": data}}])) == [BLUE]


def test_options_of_a_part_override_those_of_the_request() -> None:
    part = {"type": "pdf", "pdf": PDF, "pages": "3,1", "dpi": 72, "max_slices": 2}
    found = pictures([part, {"type": "pdf", "pdf": PDF}], pages=[2], dpi=36)
    assert colours(found) == [BLUE, RED, GREEN]
    assert [picture.size for picture in found] == [(160, 80), (160, 80), (80, 40)]
    (message,) = with_pages(parse_messages([{"role": "user", "content": [part]}]), DocumentOptions(), SLICING)
    assert [part.max_slices for part in message.parts if isinstance(part, ImagePart)] == [2, 2]


@pytest.mark.parametrize("size", [(595, 842), (842, 595), (20, 20), (5000, 3000), (14400, 1)])
@pytest.mark.parametrize("cells", [1, 9])
def test_without_a_resolution_a_page_has_what_its_slices_can_use(size: tuple[int, int], cells: int) -> None:
    (part,) = parse_messages([{"role": "user", "content": [coloured_pdf([RED], size)]}])[0].parts
    assert isinstance(part, ImagePart)
    message = parse_messages([{"role": "user", "content": [{"image": part.source, "max_slices": cells}]}])
    (picture,) = [part.source for part in iter_images(with_pages(message, DocumentOptions(), SLICING))]
    width, height = picture_size(picture)
    if max(size) < 10_000:
        assert 0.99 < width * height / (2 * cells * 448**2) < 1.02
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.01
    assert max(width, height) <= 32_767
    assert load_image(picture).size == (width, height)


def test_dots_per_inch() -> None:
    (page,) = pictures([coloured_pdf([RED], (595.2, 841.9))], dpi=200)
    assert page.size == (1654, 2339)
    for wrong in (0, -5, 10_000, "72", True, float("nan")):
        with pytest.raises(MessageError, match="expected dots per inch from 1 to 4800"):
            pictures([PDF], dpi=wrong)


def test_rotated_and_cropped_pages_are_upright() -> None:
    left_red = b"1 0 0 rg 0 0 100 100 re f 0 0 1 rg 100 0 100 100 re f"
    (page,) = pictures([written_pdf([left_red])], dpi=72)
    assert (page.size, page.getpixel((10, 50)), page.getpixel((190, 50))) == ((200, 100), RED, BLUE)
    (page,) = pictures([written_pdf([left_red], rotate=90)], dpi=72)
    assert (page.size, page.getpixel((50, 10)), page.getpixel((50, 190))) == ((100, 200), RED, BLUE)
    (page,) = pictures([written_pdf([left_red], crop=(100, 0, 200, 50))], dpi=72)
    assert (page.size, page.getpixel((5, 25))) == ((100, 50), BLUE)


def test_an_empty_page_is_white() -> None:
    (page,) = pictures([written_pdf([b""])], dpi=72)
    assert set(np.unique(np.asarray(page))) == {255}


def test_filled_forms_are_drawn() -> None:
    from reportlab.pdfgen.canvas import Canvas

    out = io.BytesIO()
    canvas = Canvas(out, pagesize=(200, 100))
    canvas.acroForm.textfield(name="a", value="XXXX", x=10, y=30, width=180, height=40, fontSize=30, borderWidth=0)
    canvas.showPage()
    canvas.save()
    (page,) = pictures([out.getvalue()], dpi=72)
    assert np.asarray(page.convert("L")).min() < 60


def test_a_thousand_pages_are_counted_at_once_and_one_of_them_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "book.pdf"
    path.write_bytes(written_pdf([b"%d 0 0 rg 0 0 200 100 re f" % (i == 776) for i in range(1000)]))
    assert PdfFile(path, "book").n_pages == 1000
    assert colours(pictures([path], pages="777")) == [RED]
    with pytest.raises(ImageError, match=r"book.pdf has 1000 pages, at most 999 are read"):
        pictures([path], page_limit=999)


def test_a_thousand_pages_in_one_question_are_refused_before_any_is_drawn(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PdfFile, "draw", lambda *_: pytest.fail("a page was drawn"))
    with pytest.raises(EdgeRuntimeError, match=r"1000 pictures \(pictures 1 to 1000: \d+ each\).*--each-page"):
        demo.chat([{"role": "user", "content": [written_pdf([b""] * 1000), "What?"]}])


def test_pixels_of_a_page_are_limited() -> None:
    page = PdfPage(PdfFile(PDF, "a.pdf"), 0, Resolution(10_000, dpi=720))
    assert page.size(1600 * 800) == (1600, 800)
    for ask in (page.size, page.render):
        with pytest.raises(ImageError, match=r"1600 x 800 = 1280000 pixels at 720 dots per inch, at most 1279999"):
            ask(1600 * 800 - 1)
    huge = PdfPage(PdfFile(coloured_pdf([RED], (14400, 2)), "a.pdf"), 0, Resolution(10_000, dpi=200))
    with pytest.raises(ImageError, match="and 32767 a side"):
        huge.size(PIXEL_LIMIT)


def test_bytes_of_a_document_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(PDF)
    uri = "data:application/pdf;base64," + base64.b64encode(PDF).decode()
    for source in (PDF, path, io.BytesIO(PDF), uri):
        assert len(pictures([{"type": "pdf", "pdf": source}], file_limit_bytes=len(PDF))) == 3
        with pytest.raises(ImageError, match=rf"bytes, at most {len(PDF) // 2} are read.*file_limit_bytes"):
            pictures([{"type": "pdf", "pdf": source}], file_limit_bytes=len(PDF) // 2)


@pytest.mark.parametrize(
    "part, reason",
    [
        ({"type": "pdf"}, "'pdf' of type NoneType"),
        ({"type": "pdf", "pdf": 5}, "'pdf' of type int"),
        ({"type": "pdf", "pdf": Image.new("RGB", (4, 4))}, "'pdf' of type Image"),
        ({"type": "pdf", "pdf": PDF, "password": 5}, "password of type int"),
        ({"type": "pdf", "pdf": PDF, "max_slices": 0}, "max_slices is 0"),
        ({"type": "pdf", "pdf": PDF, "pages": "x"}, "The pages are 'x'"),
        ({"type": "pdf", "pdf": b"hello"}, "is not a PDF"),
        ({"type": "pdf", "pdf": "absent.pdf"}, "does not exist"),
        ({"type": "pdf", "pdf": "https://host/a.pdf"}, "nothing is fetched"),
        ({"type": "pdf", "pdf": "data:application/pdf;base64,JVBERi0xLjc@"}, "not valid base64|is not a PDF"),
        ({"type": "pdf", "pdf": io.StringIO("text")}, "opened for text"),
        ({"type": "file"}, "file ids are not supported and nothing is fetched"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file ids are not supported"),
        ({"type": "file", "file": {"file_data": "/etc/passwd"}}, "nothing is fetched"),
        ({"type": "file", "file": {"file_data": "https://host/a.pdf"}}, "nothing is fetched"),
        ({"type": "input_file", "file_url": "https://host/a.pdf"}, "nothing is fetched"),
    ],
)
def test_wrong_parts_are_named(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(EdgeRuntimeError, match=reason):
        pictures([part, "q"])


def test_pages_of_pictures_are_refused() -> None:
    picture = Image.new("RGB", (9, 9))
    with pytest.raises(MessageError, match="there are only pictures"):
        pictures([picture], pages="2")
    assert len(pictures([picture, PDF], pages="2")) == 2
    assert pictures(["no picture at all"], pages="2") == []


def test_a_system_message_cannot_hold_a_document() -> None:
    with pytest.raises(MessageError, match="system prompt"):
        parse_messages([{"role": "system", "content": [{"type": "pdf", "pdf": PDF}]}])
    (message,) = parse_messages([{"role": "user", "content": [{"type": "pdf", "pdf": PDF}]}])
    assert isinstance(message.parts[0], DocumentPart)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'edge-runtime\[pdf\]'"):
        pictures([PDF])
    path = tmp_path / "a.pdf"
    path.write_bytes(PDF)
    refused(["run", str(path), QUESTION], r"pip install 'edge-runtime\[pdf\]'")


def test_many_threads_read_many_files_at_once() -> None:
    """Without its lock pdfium would crash; garbage-collected files are closed meanwhile, by any thread."""
    found: list[list[tuple[int, ...]]] = []

    def work() -> None:
        for _ in range(6):
            found.append(colours(pictures([PDF, words_pdf(["A"])], dpi=72))[:3])
            gc.collect()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [COLOURS] * 36


def test_a_file_that_is_open_when_the_program_ends_is_closed_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(PDF)
    script = "from pathlib import Path; from edge_runtime.inputs.pdf import PdfFile; "
    script += f"f = PdfFile(Path({str(path)!r}), 'a')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_demo_model_reads_pages_of_a_pdf_in_their_order(demo: Model) -> None:
    words = ["CAFE", "TAXI", "HELLO"]
    data = words_pdf(words)
    for number, word in enumerate(words, 1):
        content = [{"type": "pdf", "pdf": data, "pages": [number]}, QUESTION]
        assert str(demo.chat([{"role": "user", "content": content}], greedy=True)) == word


def test_progress_of_pages_and_cancelling(demo: Model) -> None:
    seen: list[tuple[int, int]] = []
    message = {"role": "user", "content": [PDF, "What?"]}
    demo.chat([message], max_tokens=1, max_slices=1, on_image=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    class EnoughError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise EnoughError

    seen.clear()
    with pytest.raises(EnoughError):
        demo.chat([message], on_image=stop)
    assert seen == [(1, 3)]
