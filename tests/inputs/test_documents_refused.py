"""Documents that are encrypted, damaged, or whose pages are not their content: read, or refused in one sentence."""

from __future__ import annotations

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from reportlab.lib.pdfencrypt import StandardEncryption

from edge_runtime import EdgeRuntimeError, ImageError
from support.command import refused
from support.document_maker import (
    RED,
    assembled_pdf,
    blocks,
    colours,
    pages_tiff,
    pictures,
    words_pdf,
    written_pdf,
)

QUESTION = "What does it say?"


@pytest.mark.parametrize("strength", [40, 128])
def test_encrypted_files_open_with_their_password(strength: int, tmp_path: Path) -> None:
    data = words_pdf(["CAFE"], encrypt=StandardEncryption("sesame", strength=strength))
    part = {"type": "pdf", "pdf": data}
    assert len(pictures([part], password="sesame")) == 1
    assert len(pictures([part | {"password": "sesame"}], password="other")) == 1
    with pytest.raises(ImageError, match=r"encrypted; give its password with --password"):
        pictures([part])
    with pytest.raises(ImageError, match="the password that was given does not open it"):
        pictures([part], password="other")
    path = tmp_path / "locked.pdf"
    path.write_bytes(data)
    refused(["run", str(path), QUESTION], r"locked.pdf is encrypted; give its password")


def test_a_file_that_only_its_owner_may_change_opens_without_a_password() -> None:
    assert len(pictures([words_pdf(["CAFE"], encrypt=StandardEncryption("", "owner"))])) == 1
    assert len(pictures([words_pdf(["CAFE"])], password="not needed")) == 1


BROKEN: dict[str, tuple[bytes, str]] = {
    "a header alone": (b"%PDF-1.7\n", "not a readable PDF"),
    "noise behind the header": (b"%PDF-1.7\n" + np.random.default_rng(0).bytes(5000), "not a readable PDF"),
    "no pages": (written_pdf([]), "not a readable PDF, or has no pages"),
    "its first quarter": (words_pdf(["CAFE"] * 9)[:500], "not a readable PDF"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_sentence(case: str, tmp_path: Path) -> None:
    data, reason = BROKEN[case]
    with pytest.raises(ImageError, match=reason):
        pictures([data])
    path = tmp_path / "broken.pdf"
    path.write_bytes(data)
    refused(["run", str(path), QUESTION], reason)


def test_a_file_whose_table_is_wrong_is_repaired() -> None:
    data = written_pdf([b"1 0 0 rg 0 0 200 100 re f"] * 3)
    assert colours(pictures([data.replace(b"startxref\n", b"startxref\n9")])) == [RED] * 3
    assert colours(pictures([data.replace(b"%PDF-1.7\n", b"%PDF-1.7\n" + b" " * 999)])) == [RED] * 3


@pytest.mark.parametrize("kind", ["PDF", "TIFF"])
def test_damaged_files_by_the_hundred_are_read_or_refused(kind: str) -> None:
    whole = words_pdf(["A", "B"]) if kind == "PDF" else pages_tiff(blocks([(40, 20), (30, 30), (20, 50)]))
    generator, refusals, n_read = np.random.default_rng(7), [], 0
    for _ in range(250):
        data = bytearray(whole)
        for place in generator.integers(8, len(data), generator.integers(1, 4)):
            data[place] = generator.integers(0, 256)
        cut = len(data) if generator.random() < 0.7 else int(generator.integers(100, len(data)))
        try:
            pictures([{"type": "file", "file": {"file_data": base64.b64encode(data[:cut]).decode()}}], dpi=36)
        except EdgeRuntimeError as error:
            refusals.append(str(error))
        else:
            n_read += 1
    assert min(n_read, len(refusals)) > 5
    assert not [text for text in refusals if "\n" in text]


def test_a_damaged_page_is_named_and_the_others_can_be_read() -> None:
    data = written_pdf([b"1 0 0 rg 0 0 200 100 re f"] * 3).replace(b"5 0 obj<</Type/Page/", b"5 0 obj<</Type/None/")
    assert colours(pictures([data], pages="1,3")) == [RED, RED]
    with pytest.raises(ImageError, match=r"Page 2 of The document cannot be read: it is damaged"):
        pictures([data])


def form(text: str = "CAFE", *, xfa: bool = True, dynamic: bool = False, fields: bool = False) -> bytes:
    """A PDF file with a form, as XML (XFA) or not, whose page says something."""
    content = b"BT /F1 18 Tf 10 40 Td (%s) Tj ET" % text.encode()
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R/AcroForm 6 0 R%s>>" % (b"/NeedsRendering true" if dynamic else b""),
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        page + (b"/Annots[8 0 R]>>" if fields else b">>"),
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Fields[%s]%s>>" % (b"8 0 R" if fields else b"", b"/XFA 7 0 R" if xfa else b""),
        b"<</Length 10>>stream\n<xdp:xdp/>\nendstream",
        b"<</Type/Annot/Subtype/Widget/FT/Tx/T(city)/V(x)/Rect[10 10 60 30]/P 3 0 R>>",
    ]
    return assembled_pdf(objects)


WAIT = "Please wait... Your PDF viewer may not be able to display this"


SONG = "Veuillez patienter. Adobe Reader 8 est requis"


@pytest.mark.parametrize("text, dynamic", [(WAIT, True), (WAIT, False), (SONG, False), ("CAFE", True)])
def test_dynamic_xfa_forms_are_refused_by_name(text: str, dynamic: bool, tmp_path: Path) -> None:
    data = form(text, dynamic=dynamic)
    path = tmp_path / "form.pdf"
    path.write_bytes(data)
    for source in (data, path, {"type": "pdf", "pdf": data}, io.BytesIO(b"\r\n--upload\r\n" + data)):
        with pytest.raises(ImageError, match=r"XFA form.*print it to PDF"):
            pictures([source])
    refused(["run", str(path), QUESTION], "form.pdf is an XFA form")


def test_static_xfa_forms_have_pages() -> None:
    for data in (form("CAFE", fields=True), form("CAFE"), form(WAIT, xfa=False), form(WAIT, fields=True)):
        assert len(pictures([data])) == 1


def portfolio(*, collection: bool = True, packed: bool = False, n_files: int = 2) -> bytes:
    names = b"".join(b"(%d) %d 0 R" % (i, 5 + 2 * i) for i in range(n_files))
    extra = b"/Collection<</Type/Collection/View/D>>" if collection else b""
    catalog = b"<</Type/Catalog/Pages 2 0 R%s/Names<</EmbeddedFiles<</Names[%s]>>>>>>" % (extra, names)
    hidden = b"1 0 " + catalog
    stream = zlib.compress(hidden)
    objects = [
        catalog.replace(b"/Collection", b"/Other") if packed else catalog,
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]>>",
        b"<</Type/ObjStm/N 1/First 4/Filter/FlateDecode/Length %d>>stream\n%s\nendstream" % (len(stream), stream),
    ]
    for i in range(n_files):
        objects.append(b"<</Type/Filespec/F(file%d.docx)/UF(file%d.docx)/EF<</F %d 0 R>>>>" % (i, i, 6 + 2 * i))
        objects.append(b"<</Type/EmbeddedFile/Length 1>>stream\nx\nendstream")
    return assembled_pdf(objects if packed else [*objects[:3], b"<<>>", *objects[4:]])


@pytest.mark.parametrize("packed", [False, True])
def test_portfolios_are_refused_with_the_names_of_their_files(packed: bool, tmp_path: Path) -> None:
    data = portfolio(packed=packed, n_files=5)
    path = tmp_path / "all.pdf"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(
            ImageError, match=r"portfolio.*5 attached files \(file0.docx, file1.docx, file2.docx, \.\.\.\)"
        ):
            pictures([source])


def test_attachments_alone_are_not_a_portfolio() -> None:
    """An invoice has its XML attached."""
    assert len(pictures([portfolio(collection=False)])) == 1
    assert len(pictures([portfolio(n_files=0)])) == 1


def test_pdfium_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pictures([form("CAFE", fields=True)])
    with pytest.raises(ImageError):
        pictures([form(WAIT, dynamic=True)])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
