"""What a page says of its own text is a guess of its transcription, wherever the page is opened."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from reportlab.pdfgen.canvas import Canvas

from edge_runtime import Model
from edge_runtime.engine import drafts
from edge_runtime.inputs.workers.pool import DecoderPool
from edge_runtime.options import PromptOptions
from edge_runtime.pipeline import prepare
from support.document_maker import coloured_pdf, words_pdf


def asked(data: bytes) -> list[dict[str, object]]:
    return [{"role": "user", "content": [data]}]


@pytest.fixture(scope="module")
def model():
    with Model.load("demo", n_ctx=2048) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(1, 60.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_text_of_a_page_is_a_guess(model, pool, elsewhere, monkeypatch):
    decoders = {"decoders": pool} if elsewhere else {}
    plain = model.chat(asked(words_pdf(["STOP"])), preset="ocr", greedy=True, drafts="off", **decoders)
    checked, told = drafts.draft_length, []
    monkeypatch.setattr(drafts, "draft_length", lambda draft, *more: told.append(draft) or checked(draft, *more))
    answer = model.chat(asked(words_pdf(["STOP"])), preset="ocr", greedy=True, **decoders)
    assert str(answer) == str(plain) == "STOP"
    assert "expected" in {draft.source for draft in told}


@pytest.mark.parametrize(
    ("preset", "text"), [("ocr", "ONE\n\nTWO"), ("markdown", "ONE\n\nTWO"), ("caption", ""), (None, "")]
)
def test_only_transcriptions_have_one(model, preset, text):
    question = [*asked(words_pdf(["ONE", "TWO"]))]
    if preset is None:
        question[0]["content"] = [*question[0]["content"], "What is it?"]  # type: ignore[misc]
    assert prepare(question, PromptOptions(preset=preset), model.input_format).page_text == text


def test_pages_without_text(model):
    assert (
        prepare(asked(coloured_pdf([(255, 0, 0)])), PromptOptions(preset="ocr"), model.input_format).page_text == ""
    )
    two = io.BytesIO()
    pages = [Image.new("RGB", (40, 40)) for _ in range(2)]
    pages[0].save(two, "TIFF", save_all=True, append_images=pages[1:])
    assert prepare(asked(two.getvalue()), PromptOptions(preset="ocr"), model.input_format).page_text == ""


def test_a_long_text_is_cut():
    data = io.BytesIO()
    canvas = Canvas(data, pagesize=(600, 12_100), invariant=True)
    canvas.setFont("Helvetica", 4)
    for i in range(2000):
        canvas.drawString(10, 12_080 - 6 * i, "word " * 20)
    canvas.save()
    from edge_runtime.inputs.pages import MAX_TEXT
    from edge_runtime.inputs.pdf import PdfFile

    file = PdfFile(data.getvalue(), "long")
    assert 0.9 * MAX_TEXT < len(file.text(0)) <= MAX_TEXT
    file.close()
