"""Parts of messages in OpenAI's APIs → the runtime's: pictures, documents, videos, and what is no address."""

from __future__ import annotations

import base64

import pytest

from edge_runtime.inputs.messages import ImagePart, parse_messages
from edge_runtime.server.errors import RequestError
from server.openai_bodies import chat, responses

URI = "data:image/png;base64," + base64.b64encode(b"picture").decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": URI},
        {"type": "input_image", "image_url": URI},
        {"type": "input_image", "image_url": {"url": URI}},
    ],
)
def test_a_picture_in_every_spelling(part):
    """Chat completions and responses write it differently, and clients mix them up."""
    question = {"type": "text", "text": "What is it?"}
    (message,) = parse_messages(chat([part, question]).conversation())
    assert [*message.parts] == [ImagePart(URI), "What is it?"]
    item = {"role": "user", "content": [part, {"type": "input_text", "text": "What is it?"}]}
    assert parse_messages(responses([item]).conversation_messages()) == [message]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": "file:///etc/passwd"},
        {"type": "image_url", "image_url": None},
        {"type": "image_url"},
        {"type": "image", "image": "/etc/passwd"},
        {"image": "/etc/passwd"},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": "report.pdf"},
        {"type": "input_file", "file_data": "report.pdf"},
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
        {"type": "video", "video": "clip.mp4"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": ["text"], "text": "Hi"},
        {"type": "text", "text": 5},
        7,
        None,
    ],
)
def test_no_string_of_a_client_becomes_a_path(part):
    with pytest.raises(RequestError) as error:
        chat(["ok", part]).conversation()
    assert error.value.param.startswith("messages[0].content[1]")
    with pytest.raises(RequestError) as error:
        responses([{"role": "user", "content": [part]}]).conversation_messages()
    assert error.value.param.startswith("input[0].content[0]")


def test_documents_and_videos_are_passed_on():
    data = "JVBERi0xLjcKJeLjz9MK"
    pdf, clip = f"data:application/pdf;base64,{data}", "data:video/mp4;base64,AAAA"
    parts = [
        {"type": "file", "file": {"file_data": pdf, "filename": "a.pdf"}},
        {"type": "input_file", "file_data": pdf, "filename": "a.pdf"},
        {"type": "video_url", "video_url": {"url": clip}},
        {"type": "input_video", "video_url": clip},
        {"type": "file", "file": {"file_data": data}, "pages": "1-3", "dpi": 90, "path": "/etc/passwd"},
        {"type": "video_url", "video_url": {"url": clip}, "fps": 2, "packing": 6, "video": "/etc/passwd"},
    ]
    (message,) = chat(parts).conversation()
    file = {"type": "file", "file": {"file_data": pdf, "filename": "a.pdf"}}
    video = {"type": "video_url", "video_url": {"url": clip}}
    assert message["content"] == [
        file,
        file,
        video,
        video,
        {"type": "file", "file": {"file_data": pdf}, "pages": "1-3", "dpi": 90},
        video | {"fps": 2, "packing": 6},
    ]


def test_the_detail_of_a_picture_limits_its_slices():
    parts = [
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        {"type": "input_image", "image_url": URI, "detail": "low"},
        {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
        {"type": "image_url", "image_url": {"url": URI}, "max_slices": 4},
    ]
    (message,) = chat(parts).conversation()
    assert [part.get("max_slices") for part in message["content"]] == [1, 1, None, 4]


@pytest.mark.parametrize("key", ["image_url", "input_image", "video_url"])
def test_base64_alone_becomes_a_data_uri(key):
    """Clients leave the prefix off, wrap lines and write `DATA:`; a path or a name of something stays refused."""
    name = "video_url" if key == "video_url" else "image_url"
    text = base64.b64encode(bytes(range(64))).decode()
    for sent in (text, "\r\n".join([text[:76], text[76:]]), text.rstrip("=")):
        (message,) = chat([{"type": key, name: {"url": sent}}]).conversation()
        assert message["content"][0][name]["url"] == f"data:application/octet-stream;base64,{sent}"
    uri = f"DATA:image/png;base64,{text}"
    (message,) = chat([{"type": key, name: {"url": uri}}]).conversation()
    assert message["content"][0][name]["url"] == uri
    for path in ("/etc/passwd", "picture.png", "folder/folder/folder/picture.png", "file-1"):
        with pytest.raises(RequestError, match="expected a data: URI"):
            chat([{"type": key, name: {"url": path}}]).conversation()
