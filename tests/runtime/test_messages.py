"""Every form in which clients send messages, and the refusal of all others."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from edge_runtime import MessageError
from edge_runtime.messages import ImagePart, Message, parse_messages, split_reasoning


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = Image.new("RGB", (4, 4))
URI = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("content", "source"),
    [
        ([PICTURE, "q"], PICTURE),
        ([Path("a.png"), "q"], Path("a.png")),
        ([b"bytes", "q"], b"bytes"),
        ([{"type": "image", "image": PICTURE}, {"type": "text", "text": "q"}], PICTURE),
        ([{"image": "a.png"}, "q"], "a.png"),
        ([{"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "q"}], URI),
        ([{"type": "image_url", "image_url": URI}, {"type": "text", "text": "q"}], URI),
        ([{"type": "input_image", "image_url": URI}, {"type": "input_text", "text": "q"}], URI),
    ],
)
def test_forms_of_pictures(content, source):
    (message,) = parse_messages([{"role": "user", "content": content}])
    assert message.parts == (ImagePart(source), "q")


def test_a_question_alone():
    assert parse_messages("why?") == [Message("user", ("why?",))]


@pytest.mark.parametrize("image", [base64.b64encode(png()).decode(), URI, png()])
def test_ollamas_images_come_first(image):
    (message,) = parse_messages([{"role": "user", "content": "q", "images": [image]}])
    picture, question = message.parts
    assert isinstance(picture, ImagePart)
    assert question == "q"


@pytest.mark.parametrize("key", ["max_slices", "max_slice_nums"])
def test_limit_per_picture(key):
    uri = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}, key: 1}
    (message,) = parse_messages([{"role": "user", "content": [{"image": "a.png", key: 2}, uri]}])
    assert message.parts == (ImagePart("a.png", 2), ImagePart("data:image/png;base64,AAAA", 1))


def test_reasoning_of_earlier_answers():
    answer = {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nyes"}
    (message,) = parse_messages([answer])
    assert (message.reasoning, message.parts) == ("because", ("yes",))
    (message,) = parse_messages([{"role": "assistant", "content": "yes", "reasoning_content": "because"}])
    assert (message.reasoning, message.parts) == ("because", ("yes",))
    assert split_reasoning("a</think>b</think>\nc") == ("a", "c")
    assert split_reasoning("plain") == (None, "plain")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "empty"),
        (["text"], "mapping"),
        ([{"content": "no role"}], "role None"),
        ([{"role": "wizard", "content": "q"}], "wizard"),
        ([{"role": "user", "content": 5}], "type int"),
        ([{"role": "user", "content": [5]}], "type int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "audio"),
        ([{"role": "user", "content": [{"type": "image", "image": 5}]}], "type int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "http://host/a.png"}]}],
            "nothing is fetched",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
            "nothing is fetched",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "nothing is fetched"),
        ([{"role": "user", "content": "q", "images": ["not base64!"]}], "base64"),
        ([{"role": "system", "content": [PICTURE]}], "system prompt"),
        (5, "type int"),
        ([{"role": "user", "content": "q", "images": 5}], "'images' of type int"),
        ([{"role": "assistant", "content": "q", "tool_calls": 5}], "'tool_calls' of type int"),
        ([{"role": "user", "content": [{"image": "a.png", "max_slice_nums": "two"}]}], "max_slices is 'two'"),
    ],
)
def test_wrong_messages_are_named(messages, complaint):
    with pytest.raises(MessageError, match=complaint):
        parse_messages(messages)
