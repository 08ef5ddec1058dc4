"""Base64 as clients write it: one decoder, the same bytes everywhere, and a sentence for what is not base64."""

from __future__ import annotations

import base64
import io
import textwrap
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.errors import ImageError, MessageError
from edge_runtime.inputs.image import load_image
from edge_runtime.system.base64_data import (
    as_data_uri,
    data_uri_head,
    data_uri_size,
    decode_base64,
    decode_data_uri,
    is_data_uri,
    looks_like_base64,
)
from support.document_maker import pictures, words_pdf

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "PNG")
    return out.getvalue()


def wrapped(text: str, end: str = "\n", width: int = 76) -> str:
    return end.join(textwrap.wrap(text, width)) + end


WAYS = {
    "one line": lambda data: base64.b64encode(data).decode(),
    "lines of 76, LF": lambda data: wrapped(base64.b64encode(data).decode()),
    "lines of 64, CR LF": lambda data: wrapped(base64.b64encode(data).decode(), "\r\n", 64),
    "lines of 76, CR": lambda data: wrapped(base64.b64encode(data).decode(), "\r"),
    "blanks and tabs": lambda data: "  " + wrapped(base64.b64encode(data).decode(), " \t") + "\n",
    "encodebytes": lambda data: base64.encodebytes(data).decode(),
    "for URLs": lambda data: base64.urlsafe_b64encode(data).decode(),
    "for URLs, unpadded": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
    "unpadded": lambda data: base64.b64encode(data).decode().rstrip("="),
}


@pytest.mark.parametrize("way", WAYS)
@given(data=st.binary(max_size=400))
def test_every_way_of_writing_gives_the_same_bytes(way: str, data: bytes) -> None:
    text = WAYS[way](data)
    assert decode_base64(text) == data
    assert decode_base64(text.encode()) == data
    for uri in (as_data_uri(text), "DATA:IMAGE/PNG;BASE64," + text, "data:;charset=utf-8; base64," + quote(text)):
        assert is_data_uri(uri)
        assert decode_data_uri(uri) == data
        assert data_uri_head(uri, 64) == data[:64]
        assert len(data) <= data_uri_size(uri) <= len(data) + 3 + 3 * len(text) // 4 * ("%" in uri)


@given(data=st.binary(max_size=100))
def test_data_without_base64_is_escaped_characters(data: bytes) -> None:
    uri = "data:application/octet-stream," + quote(data)
    if not looks_like_base64(quote(data)):
        assert decode_data_uri(uri) == data
        assert data_uri_head(uri, 10) == data[:10]
        assert data_uri_size(uri) == len(data)


@pytest.mark.parametrize(
    "text",
    [
        "AAAA*AAA",
        "äöü=",
        "A",
        "AAAAA",
        "A===",
        "AA=",
        "AA==AA==",
        "=AAA",
        "AAAA====",
        "ab+/ab-_",
        "AAA.",
        "AAAA\0AAAA",
        "\ufeffAAAA",
        "iVBORw0KGgo\\nAAAA",
    ],
)
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        decode_base64(text)
    with pytest.raises(ValueError, match="base64"):
        decode_data_uri("data:image/png;base64," + text)


@pytest.mark.parametrize(
    "uri, reason",
    [
        ("data:image/png;base64", "no comma"),
        ("data:", "no comma"),
        ("data:" + "x" * 5000 + ",AAAA", "no comma"),
        ("data:image/png," + base64.b64encode(png()).decode(), "lacks ';base64'"),
        ("data:image/png;base64;x=1," + base64.b64encode(png()).decode(), "lacks ';base64'"),
    ],
)
def test_invalid_data_uris(uri: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_data_uri(uri)
    assert base64.b64decode(b"iVBORw0KGgo=") not in data_uri_head(uri, 10)
    with pytest.raises(ImageError, match=f"data: URI is not valid base64.*{reason}"):
        load_image(uri)


def test_a_quoted_comma_does_not_end_the_header() -> None:
    text = base64.b64encode(png()).decode()
    assert decode_data_uri(f'data:image/png;name="a, b.png";base64,{text}') == png()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:image/PNG;Base64,"])
def test_every_kind_of_part_accepts_it(way: str, prefix: str) -> None:
    text = prefix + WAYS[way](png())
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": text}},
        {"type": "image_url", "image_url": text},
        {"type": "input_image", "image_url": text},
        {"type": "file", "file": {"file_data": text}},
        {"type": "input_file", "file_data": text},
    ]
    if prefix:
        parts.append({"type": "image", "image": text})
    for part in parts:
        (found,) = pictures([part])
        assert np.array_equal(np.asarray(found), PIXELS), part["type"]


@pytest.mark.parametrize("way", WAYS)
def test_documents_too(way: str) -> None:
    text = WAYS[way](words_pdf(["CAFE", "ZOO"]))
    for part in (
        {"type": "pdf", "pdf": "Data:application/pdf;BASE64," + text},
        {"type": "file", "file": {"file_data": text}},
        {"type": "image_url", "image_url": {"url": text}},
    ):
        assert len(pictures([part], dpi=36)) == 2


@pytest.mark.parametrize(
    "text", ["photo", "/etc/passwd", "a.png", "photos/2024/cat.jpg", "", "A" * 17, "https://h/a"]
)
def test_names_are_not_base64(text: str) -> None:
    with pytest.raises(MessageError, match="nothing is fetched"):
        pictures([{"type": "image_url", "image_url": {"url": text}}])
