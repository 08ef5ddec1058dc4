"""A refusal says what the file is: by its bytes, whatever its name, with what to do."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.errors import ImageError
from edge_runtime.inputs.file_kinds import kind_of
from edge_runtime.inputs.image import load_image, picture_size
from edge_runtime.inputs.picture_formats import is_pdf, is_sequence
from support.document_maker import pictures, words_pdf


def zipped(*names: str, first: bytes = b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        if first:
            archive.writestr("mimetype", first)
        for name in names:
            archive.writestr(name, b"x" * 3000)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    return out.getvalue()


def box(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0" + b"isom" + brand + bytes(600)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
KINDS: dict[str, tuple[bytes, str]] = {
    "RAF": (b"FUJIFILMCCD-RAW 0201FF129502", r"raw photograph \(RAF\); develop it"),
    "ORF": (b"IIRO\x08\0\0\0" + bytes(99), r"raw photograph \(ORF\)"),
    "RW2": (b"IIU\0\x18\0\0\0" + bytes(99), r"raw photograph \(RW2\)"),
    "CR2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), r"raw photograph \(CR2\)"),
    "CR3": (box(b"crx "), r"raw photograph \(CR3\)"),
    "CRW": (b"II\x1a\0\0\0HEAPCCDR" + bytes(99), r"raw photograph \(CRW\)"),
    "MRW": (b"\0MRM" + bytes(99), r"raw photograph \(MRW\)"),
    "X3F": (b"FOVb" + bytes(99), r"raw photograph \(X3F\)"),
    "JPEG XL": (b"\xff\x0a\xfa\x1f\x01\x91\x08\x06\x01\0" + bytes(99), "JPEG XL"),
    "JPEG XL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
    "JPEG XR": (b"II\xbc\x01\x20\0\0\0" + bytes(99), "JPEG XR"),
    "BPG": (b"BPG\xfb" + bytes(99), "BPG"),
    "OpenEXR": (b"v/1\x01" + bytes(99), "OpenEXR.*no white"),
    "HDR": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance"),
    "DICOM": (bytes(128) + b"DICM\x02\0\0\0UL", "DICOM.*from a viewer"),
    "GIMP": (b"gimp xcf v011\0" + bytes(99), "XCF"),
    "WMF": (b"\xd7\xcd\xc6\x9a" + bytes(99), "WMF"),
    "EMF": (b"\x01\0\0\0\x6c\0\0\0" + bytes(32) + b" EMF" + bytes(99), "EMF"),
    "DWG": (b"AC1032" + bytes(99), "DWG"),
    "DjVu": (b"AT&TFORM\0\0\0\0DJVU" + bytes(99), "DjVu"),
    "RTF": (rb"{\rtf1\ansi Hello}", "RTF"),
    "DOC": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "Office document of the old kind"),
    "DOCX": (zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"), r"Word document \(DOCX\).*as PDF"),
    "XLSX": (zipped("[Content_Types].xml", "xl/workbook.xml"), "XLSX"),
    "PPTX": (zipped("[Content_Types].xml", "ppt/presentation.xml"), "PPTX"),
    "PPTX behind pictures": (zipped(*[f"m{i}.png" for i in range(40)], "ppt/presentation.xml"), "PPTX"),
    "EPUB": (zipped("OEBPS/a.xhtml", first=b"application/epub+zip"), "EPUB"),
    "ODT": (zipped("content.xml", first=b"application/vnd.oasis.opendocument.text"), "OpenDocument"),
    "ZIP": (zipped("photos/a.jpg"), "ZIP archive; unpack it"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "7-Zip"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(99), "RAR"),
    "tar": (tarred(), "tar archive"),
    "gzip": (gzip.compress(b"anything"), "gzip archive"),
    "SVGZ": (gzip.compress(b"<?xml version='1.0'?>" + SVG), "SVGZ"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(99), "model file.*with -m"),
    "NumPy": (b"\x93NUMPY\x01\0v\0{'descr': '|u1'}", "NumPy array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "MP4": (box(b"isom"), "MP4 video; give it as a video"),
    "QuickTime": (box(b"qt  "), "QuickTime video"),
    "WebM": (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01" + bytes(99), "WebM video"),
    "AVI": (b"RIFF\0\1\0\0AVI LIST" + bytes(99), "AVI video"),
    "MPEG": (b"\0\0\x01\xb3\x14\0\xf0\x13" + bytes(99), "MPEG video"),
    "MPEG-TS": ((b"G" + bytes(187)) * 4, "MPEG transport stream"),
    "WAV": (b"RIFF\0\1\0\0WAVEfmt " + bytes(99), "sound file"),
    "MP3": (b"ID3\x03\0\0\0" + bytes(99), "sound file"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s123--abc.png\n", "git annex get"),
    "HTML": (b"<!DOCTYPE html>\n<html><title>404</title>", r"web page \(HTML\)"),
    "HTML in capitals": (b"\xef\xbb\xbf  <HTML><BODY>Log in</BODY></HTML>", r"web page \(HTML\)"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML file"),
    "JSON": (b'{"error": {"message": "not found"}}', "JSON file, perhaps an error"),
    "text": ("Grüße, this is no picture.\n".encode(), "text file"),
    "text in UTF-16": ("no picture".encode("utf-16"), "text file"),
    "base64": (b"iVBORw0KGgoAAAANSUhEUgAA\n", "written as base64"),
    "data URI": (b"data:image/png;base64,iVBORw0KGgo=", "written as base64"),
    "script": (b"#!/bin/sh\necho\n", "script"),
    "link": (b"[InternetShortcut]\r\nURL=https://example.org/a.png\r\n", "link to a web page"),
    "macOS": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(99), r"\._"),
    "PNG behind a form's head": (b"--x\r\n\r\n\x89PNG\r\n\x1a\n" + bytes(99), "PNG picture after 7 bytes"),
    "zeros": (bytes(5000), "nothing but zeros"),
    "program": (b"\x7fELF\x02\x01\x01" + bytes(99), "program"),
    "font": (b"OTTO\0\x0c" + bytes(99), "font"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_file_is_named(kind: str, tmp_path: Path) -> None:
    data, reason = KINDS[kind]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (path, data):
        for read in (load_image, picture_size, lambda source: pictures([source])):
            with pytest.raises(ImageError, match=reason) as refusal:
                read(source)
            text = str(refusal.value)
            assert "\n" not in text
            assert text.endswith(".")
            assert len(text) < 400 + len(str(path))


def test_unknown_files_get_no_kind() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    assert kind_of(b"\x05" + noise) is None
    with pytest.raises(ImageError, match="not a picture in a known format; expected JPEG"):
        load_image(b"\x05" + noise)


def test_pictures_that_pillow_reads_are_read_whatever_they_hold() -> None:
    """No entry of this table may match a format that is read."""
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "TGA", "ICO", "JPEG2000", "SGI", "PCX"):
        out = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(out, kind)
        assert load_image(out.getvalue()).size == (32, 32)


def test_sequences_are_distinguished_from_pictures() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]
    out = io.BytesIO()
    frames[0].save(out, "AVIF", save_all=True, append_images=frames[1:])
    assert is_sequence(out.getvalue()[:1024])
    still = io.BytesIO()
    frames[0].save(still, "AVIF")
    assert not is_sequence(still.getvalue()[:1024])
    for brand, expected in ((b"hevc", True), (b"msf1", True), (b"heic", False), (b"mif1", False), (b"isom", False)):
        assert is_sequence(box(brand)) is expected


# --- PDF behind other bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, 100, 1019, 1024])
@pytest.mark.parametrize("fill", [b"\n", b"\0", b"\xef\xbb\xbf", b"Content-Type: application/pdf\r\n\r\n"])
def test_bytes_before_a_pdf_are_skipped(n_bytes: int, fill: bytes, tmp_path: Path) -> None:
    import base64

    data = (fill * n_bytes)[:n_bytes] + words_pdf(["CAFE", "ZOO"])
    assert is_pdf(data[:1032])
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    uri = f"data:application/octet-stream;base64,{text}"
    for part in (
        path,
        data,
        io.BytesIO(data),
        {"type": "image", "image": str(path)},
        {"type": "image", "image": uri},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": {"url": text}},
        {"type": "pdf", "pdf": path},
        {"type": "file", "file": {"file_data": text}},
    ):
        assert len(pictures([part], dpi=36)) == 2, part
    with pytest.raises(ImageError, match="is a PDF document, expected a picture"):
        load_image(data)


def test_a_picture_that_mentions_pdf_is_a_picture() -> None:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Source", "%PDF-1.7")
    out = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(out, "PNG", pnginfo=text)
    assert b"%PDF-" in out.getvalue()[:1024]
    assert load_image(out.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    assert [found.size for found in pictures([out.getvalue()])] == [(9, 9)]


def test_a_mark_too_far_inside_does_not_count() -> None:
    with pytest.raises(ImageError, match="not a picture in a known format"):
        pictures([b"x" * 1100 + words_pdf(["CAFE"])])
