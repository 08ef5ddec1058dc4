"""Every form in which clients send messages; all others are refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from edge_runtime import MessageError
from edge_runtime.inputs.messages import ImagePart, Message, parse_messages, split_reasoning


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


A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize(
    ("content", "images", "parts"),
    [
        ("[img]q", [A], [A, "q"]),
        ("q[img]", [A], ["q", A]),
        ("Frame 0:\n[img]\nFrame 1:\n[img]\nq", [A, B], ["Frame 0:", A, "Frame 1:", B, "q"]),
        ("is [img] like [img] ?", [A, B], ["is", A, "like", B, "?"]),
        ("see [img]", [A, B], [B, "see", A]),  # as Ollama does: the first picture takes the mark
        ("see [img]", [A, B, C], [B, C, "see", A]),
        ("[img] [img]", [A], [A, "[img]"]),  # a mark that no picture takes is text
        ("x [img] y", [], ["x [img] y"]),
        ("[img-1] then [img-0]", [A, B], [B, "then", A]),
        ("[img-1] q", [A, B], [A, B, "q"]),
        ("[img-1] then [img]", [A, B], [B, "then", A]),
        ("say [img-7]", [A], [A, "say [img-7]"]),
        ("[img-0] and [img-0]", [A], [A, "and [img-0]"]),
        ("[img-00] [img-x] [IMG] [img", [A], [A, "[img-x] [IMG] [img"]),
        ("[img-" + "9" * 5000 + "]", [A], [A, "[img-" + "9" * 5000 + "]"]),
        ("[img]\r\nq", [A], [A, "q"]),
        ("a\n\n[img]\n\n  b", [A], ["a\n", A, "\n  b"]),  # one line break on each side is the picture's own
        ("[img]", [A], [A]),
        ("", [A], [A, ""]),
        (["one [img]", {"type": "text", "text": "two"}, C, "[img]"], [A, B], ["one", A, "two", C, B]),
    ],
)
def test_ollamas_images_stand_at_their_marks(content, images, parts):
    (message,) = parse_messages([{"role": "user", "content": content, "images": images}])
    assert message.parts == tuple(ImagePart(part) if isinstance(part, bytes) else part for part in parts)


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        ("b [img-2] c [img-1]", ["b", ImagePart(C), "c", ImagePart(B)]),  # counted through the conversation
        ("b [img-1] c [img-0]", [ImagePart(C), "b", ImagePart(B), "c [img-0]"]),  # 0 is the first message's
        (
            "b [img-0]",
            [ImagePart(C), "b", ImagePart(B)],
        ),  # counted in the message, where no number is meant otherwise
        ("b [img]", [ImagePart(C), "b", ImagePart(B)]),
    ],
)
def test_numbers_of_marks_in_later_messages(second, parts):
    messages = [
        {"role": "user", "content": "a [img-0]", "images": [A]},
        {"role": "assistant", "content": "yes [img]"},
        {"role": "user", "content": second, "images": [B, C]},
    ]
    first, answer, last = parse_messages(messages)
    assert first.parts == ("a", ImagePart(A))
    assert answer.parts == ("yes [img]",)
    assert last.parts == tuple(parts)


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
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "text of type NoneType; expected a string"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 5}]}], "text of type int"),
        ([{"role": "user", "content": [{"text": ["q"]}]}], "text of type list"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text of type NoneType"),
        ([{"role": "assistant", "content": "q", "reasoning": 5}], "'reasoning' of type int; expected a string"),
        ([{"role": "assistant", "content": "q", "reasoning_content": ["x"]}], "'reasoning_content' of type list"),
        ([{"role": "assistant", "content": "q", "thinking": False}], "'thinking' of type bool"),
        ([{"role": "assistant", "content": [PICTURE], "thinking": {"a": 1}}], "'thinking' of type dict"),
    ],
)
def test_wrong_messages_are_named(messages, complaint):
    with pytest.raises(MessageError, match=complaint):
        parse_messages(messages)
