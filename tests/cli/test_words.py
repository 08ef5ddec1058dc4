"""Words of the command line: what is a file, what is text, and what is refused."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime.cli.file_names import find_named, folded
from edge_runtime.cli.piped import Piped, told_apart
from edge_runtime.cli.program import main
from edge_runtime.cli.video_options import is_video
from edge_runtime.cli.words import looks_like_file, parse_arguments
from edge_runtime.errors import ImageError, MessageError
from support.command import refused

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"
QUESTION = "What does it say?"
DRAWING = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>"

FILES = [
    *("circle.pgn", "circle.png", "IMG_0001.JPG", "photo.jpg_large", "scan.p7m", "archive.tar.gz", "notes.md"),
    *("Node.js", "sub/circle", "sub/circle.png", "a/b/c", "photos/", "./photos", "../photos", "~/photos"),
    *("~somebody/x", "/photos", "photos/*", "*.jpg", "img{1,2}.png", "photo?.png", "photo.png?", "'photo.png'"),
    *("(photo.png)", "photo.png.", "my holiday.jpg", "my holiday.jgp", "my holiday.pgn", "my holiday.jpgg"),
    *("report 2026.docx", "Screenshot 2026-11-30 at 9.22.20 PM.png", "Bildschirmfoto von gestern.tiff"),
    *("was geschah.mp4", "a b.HEIC", "C:/x/photo.jpg", "C:\\x\\photo.jpg", "C:\\x", "D:/", "\\\\server\\share"),
    *(".\\x", "sub\\circle", "C:/My Files/x", "./my photos", "~/My Pictures/one", "../x y", "/mnt/My Disk/photo"),
    *("my photos/", "/Volumes/USB Stick/a", "rtsp://camera/1", "RTSP://camera/1", "http://host/a.png"),
    *("https://host/a b.png", "s3://bucket/key", "blob:http://x/y", "file:///no/such.png", "gs://b/k"),
    *("udp://@239.0.0.1:1234", "camera.local/stream", "www.host.org/a", "x" * 5000 + ".png"),
    *("https://host/" + "y" * 5000, "2026/11/photo", "1/photo", "a//b", "iVBORw0KGgo/AAAA"),
    *("照片/猫", "照片/猫.png", "你好，世界.png", "./猫，狗"),
]  # fmt: skip

TEXTS = [
    *("", " ", "What is 1/2 + 3/4?", "and/or", "Say yes.", "e.g. this", "v1.2?", "v1.2", "Read it. Now."),
    *("What's in a.b?", "What is in photo.png?", "a.b", "Describe a.jpg now", "x" * 5000, "nul\0byte", "1/2"),
    *("24/7", "30/11/2026", "-1/2", "Hello.", "Hello", "Hello!", "e.g.", "U.S.A.", "U.S.A", "Ph.D.", "3.14"),
    *("1.5x", "192.168.0.1", "...", "Wait...what", "yes/no?", "(he/she)", "n/a", "TCP/IP", "Is it on/off?"),
    *("50%/50%", "<ref>dog</ref>", "<b>", ":-)", "a=b", "C:", "Q: why?", "~50 apples"),
    *("What does https://example.com/ tell?", "Tell me about Node.js", "See www.example.com", "to: me@x.org"),
    *("Two lines:\nphoto.png", "One\nmy holiday.jpg", "Is it a.png, b.png or c.png?", 'Say "photo.png"'),
    *("What is .png", "/think it over", "data: what is it, then?", "note: this", "Größe?", "写真は何ですか"),
    *("写真は何ですか。", "¿Qué es?", "the end.", "a. b. c", "What is 3 / 4", "Explain index.html"),
    *("I like e.g. cats", "Version 2.0", "He left.\tShe came.", "Tell me about usa.gov"),
    *("1/2加3/4等于多少？", "和/或。", "这张图片，里面有什么/谁", "猫。"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    return path


@pytest.mark.parametrize("word", FILES)
def test_what_can_only_be_a_file_is_one_or_an_error(folder, word):
    assert looks_like_file(word)
    with pytest.raises(ImageError, match=r"(does not exist|nothing is fetched).*, or, .*--prompt\.$") as error:
        parse_arguments([word, QUESTION])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("text", TEXTS)
def test_prose_stays_text(folder, text):
    assert parse_arguments([text]) == [text]
    assert not looks_like_file(text)


def test_the_way_out_takes_anything(folder):
    picture(folder / "a.png")
    content = ["run", "--prompt", "Node.js", "-p", "a.png", "--max-tokens", "1", "--json"]
    result = CliRunner().invoke(main, content)
    assert result.exit_code == 0, result.stderr
    assert '"visual_tokens": 0' in result.stdout
    both = CliRunner().invoke(main, ["run", "a.png", "--prompt", "sub/circle", "--max-tokens", "1", "--json"])
    assert '"visual_tokens": 0' not in both.stdout


def test_what_is_there_is_a_file_whatever_it_looks_like(folder):
    names = ["README", "What is this?", "1", "my file", "v1.2", "a.b", "and/or", "what.now"]
    for name in names:
        picture(folder / name)
    for name in names:
        assert parse_arguments([name, "so"]) == [Path(name), "so"]


def test_a_folder_is_one_without_a_slash_too(folder):
    picture(folder / "frames" / "1.png")
    (folder / "docs").mkdir()
    assert parse_arguments(["frames", QUESTION]) == [Path("frames"), QUESTION]
    assert parse_arguments(["frames/", QUESTION]) == [Path("frames/"), QUESTION]
    with pytest.raises(ImageError, match="is a folder without pictures"):
        parse_arguments([".", QUESTION])
    with pytest.raises(ImageError, match=r"docs is a folder without pictures.*--prompt"):
        parse_arguments(["describe", "the", "docs"])


ALIKE = {
    "narrow blank": ("Screenshot 2026-11-30 at 9.22.20\u202fPM.png", "Screenshot 2026-11-30 at 9.22.20 PM.png"),
    "no-break blank": ("my\u00a0holiday.jpg", "my holiday.jpg"),
    "thin blank": ("my\u2009holiday.jpg", "my holiday.jpg"),
    "ideographic blank": ("my\u3000holiday.jpg", "my holiday.jpg"),
    "typed with one": ("my holiday.jpg", "my\u00a0holiday.jpg"),
    "two blanks": ("my  holiday.jpg", "my holiday.jpg"),
    "blank at the end": ("holiday.jpg", "holiday.jpg "),
    "taken apart": (unicodedata.normalize("NFD", "Größe é.png"), unicodedata.normalize("NFC", "Größe é.png")),
    "put together": (unicodedata.normalize("NFC", "Größe é.png"), unicodedata.normalize("NFD", "Größe é.png")),
    "apostrophe": ("Capture d\u2019écran.png", "Capture d'écran.png"),
    "quotes": ("\u201cbest\u201d.png", '"best".png'),
    "dash": ("2025\u20132026.png", "2025-2026.png"),
    "no-break hyphen": ("a\u2011b.png", "a-b.png"),
    "mark of direction": ("\u200eWhatsApp Image.jpeg", "WhatsApp Image.jpeg"),
    "zero width": ("a\u200bb\ufeff.png", "ab.png"),
    "full width": ("\uff21\uff22.png", "AB.png"),
    "ligature": ("\ufb01sh.png", "fish.png"),
    "variation": ("love \u2764\ufe0f.png", "love \u2764.png"),
    "ellipsis": ("wait\u2026.png", "wait....png"),
    "other case": ("IMG_0001.JPG", "img_0001.jpg"),
    "inside folders": ("Mes\u00a0photos/É.png", "Mes photos/" + unicodedata.normalize("NFD", "É") + ".png"),
    "a folder": ("my\u202fframes/1.png", "my frames"),
}


@pytest.mark.parametrize(("name", "typed"), ALIKE.values(), ids=ALIKE.keys())
def test_a_name_that_looks_the_same_is_found(folder, name, typed):
    made = picture(folder / name)
    (found,) = parse_arguments([typed])
    assert isinstance(found, Path)
    assert found.samefile(made if made.suffix in typed or "." in typed else made.parent)


def test_of_two_that_look_the_same_none_is_chosen(folder):
    for name in ("a\u00a0b.png", "a\u202fb.png"):
        picture(folder / name)
    with pytest.raises(ImageError, match=r"may mean any of .*; name one exactly"):
        parse_arguments(["a b.png"])
    assert parse_arguments(["a\u202fb.png"]) == [Path("a\u202fb.png")]
    picture(folder / "a b.png")
    assert parse_arguments(["a b.png"]) == [Path("a b.png")]


def test_text_is_no_file_of_other_case(folder):
    picture(folder / "README")
    assert parse_arguments(["readme"]) == ["readme"]


def test_folding_makes_names_alike_and_no_others():
    assert folded(" A\u202f\u2019\u2013 B ") == "A '- B"
    assert len({folded(name) for name in ("a.png", "b.png", "A.png", "ä.png", "a_.png")}) == 5
    assert find_named("") == []


def test_what_is_nearly_there_is_named(folder):
    picture(folder / "circle.png")
    picture(folder / "sub" / "square.png")
    picture(folder / "my holiday.jpg")
    for typed, there in (
        ("circle.pgn", "circle.png"),
        ("sub/square", "sub/square.png"),
        ("holiday.jpg", "my holiday.jpg"),
    ):
        with pytest.raises(ImageError, match=f"does not exist, but {Path(there)} is there"):
            parse_arguments([typed])


@pytest.mark.skipif(os.name == "nt", reason="a backslash is a slash there")
def test_paths_as_shells_and_browsers_write_them(folder):
    made = picture(folder / "my holiday.png")
    for typed in ("my\\ holiday.png", "'my holiday.png'", '"my holiday.png"', f"file://{folder}/my%20holiday.png"):
        assert [found.samefile(made) for found in parse_arguments([typed])] == [True], typed


def test_a_question_about_a_picture_that_nobody_looks_at_is_refused(folder):
    picture(folder / "a.png")
    picture(folder / "sub" / "b.png")
    for question in ("What is in a.png?", "Compare 'a.png'.", "What is ![this](sub/b.png)?", "See ./a.png, please."):
        with pytest.raises(MessageError, match=r"which exists but was not given.*--prompt"):
            parse_arguments([question])
    for question in ("What is on https://host/a.png?", "Watch rtsp://cam/1 for me", "See https://h/a.jpg?w=2 now."):
        with pytest.raises(MessageError, match="nothing is fetched"):
            parse_arguments([question])
    assert parse_arguments(["a.png", "What is in a.png?"]) == [Path("a.png"), "What is in a.png?"]
    assert parse_arguments(["What is in ./a.png?", str(folder / "a.png")])[1] == folder / "a.png"


@pytest.mark.parametrize(
    "word", ["\u2014greedy", "\u2013\u2013json", "\u2012\u2012max-tokens=3", "\u2212m", "\u2014-think"]
)
def test_options_with_typographic_dashes_are_no_text(word):
    refused(["run", "Hi", word], "starts with a typographic dash; type -")
    assert parse_arguments([word]) == [word]  # outside of the command no option is known


def test_other_words_that_are_files(folder):
    picture(folder / "a.png")
    (folder / "system.txt").write_text("Be kind.")
    for arguments, reason in (
        (["run", "Hi", "--system", "system.txt"], "--system is the name of a file"),
        (["run", "a.png", QUESTION, "--draw", "./a.png"], "--draw would replace a.png"),
        (["run", "-", QUESTION, "--schema", "-"], "stdin can be read once"),
        (["run", "-"], "A chat reads its questions from stdin"),
    ):
        result = CliRunner().invoke(main, arguments, input=EXAMPLE.read_bytes())
        assert result.exit_code == 2, result.stderr
        assert reason in result.stderr
        assert result.stdout == ""
    refused(["run", "-", "/dev/stdin", QUESTION], "stdin is named 2 times")


# ---------------------------------------------------------------- stdin and pipes


@pytest.mark.parametrize("word", ["-", "/dev/stdin", "/dev/fd/0"])
def test_a_picture_comes_through_stdin(word):
    result = CliRunner().invoke(main, ["run", word, QUESTION, "--greedy"], input=EXAMPLE.read_bytes())
    assert (result.exit_code, result.stdout) == (0, "CAFE\n"), result.stderr


def test_text_comes_through_stdin(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "edge_runtime.cli.terminal.answer", lambda model, messages, *a, **k: seen.append(messages) or 1 / 0
    )
    for raw in ("Hé".encode(), "\ufeffHé\r\n".encode(), "Hé".encode("utf-16"), "Hé\n".encode("utf-32")):
        CliRunner().invoke(main, ["run", "-", "Why?"], input=raw)
        assert seen.pop()[0]["content"] == ["Hé\n\nWhy?"]
    CliRunner().invoke(main, ["run", "-"], input=b"What is 1 + 1?\n")
    assert seen.pop()[0]["content"] == ["What is 1 + 1?"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"stdin is empty \(0 bytes\)"),
        (b" \r\n\n", "stdin holds only whitespace"),
        (b"caf\xe9", "not a picture in a known format"),
        (b"\0\1\2\3", "not a picture in a known format"),
        (DRAWING, "is an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "picture"),
        (EXAMPLE.read_bytes()[:200], "cannot be decoded"),
    ],
    ids=["empty", "blank", "latin-1", "bytes", "drawing", "pointer", "cut"],
)
def test_what_cannot_be_asked_about(data, reason):
    result = CliRunner().invoke(main, ["run", "-", QUESTION], input=data)
    assert result.exit_code == 1
    assert re.search(reason, result.stderr), result.stderr
    assert result.stdout == ""


def test_what_comes_through_a_pipe_is_told_apart():
    assert told_apart(b"a\tb\r\n", "x") == "a\tb"
    assert isinstance(told_apart(b"P1\n2 2\n0 1 1 0\n", "x"), Piped), "a picture in plain text"
    assert isinstance(told_apart(b"junk\n%PDF-1.7\n", "x"), Piped)
    assert str(told_apart(b"\xff\xd8\xff", "stdin")) == "stdin"
    assert told_apart(b"#define max(a, b) a\n", "x") == "#define max(a, b) a"


def test_videos_are_told_by_their_first_bytes():
    packet = b"G" + bytes(187)
    for head in (
        b"\0\0\0\x20ftypisom" + bytes(20),
        b"\0\0\0\x20ftypqt  " + bytes(20),
        b"\0\0\0\x08wide" + bytes(20),
        b"\x1aE\xdf\xa3" + bytes(20),
        b"RIFF\0\0\0\0AVI LIST",
        b"FLV\x01\x05",
        packet * 3,
        (bytes(4) + packet) * 3,
        b"\0\0\x01\xba" + bytes(20),
    ):
        assert is_video(head), head[:12]
    for head in (
        b"\0\0\0\x20ftypheic" + bytes(20),
        b"\0\0\0\x20ftypavif" + bytes(20),
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"Good",
        b"",
    ):
        assert not is_video(head), head[:12]
    assert not is_video(EXAMPLE.read_bytes())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_are_read(folder):
    os.mkfifo(folder / "pipe")
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    writer = threading.Thread(target=lambda: (folder / "pipe").write_bytes(EXAMPLE.read_bytes()))
    writer.start()
    (found,) = parse_arguments(["pipe"])
    writer.join()
    assert found == EXAMPLE.read_bytes()
    assert str(found) == "pipe"


@pytest.mark.skipif(os.name == "nt", reason="no such devices there")
def test_devices_and_sockets_are_refused(folder):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        for word in ("socket", "/dev/zero", "/dev/null"):
            with pytest.raises(ImageError, match="is a device or a socket"):
                parse_arguments([word, QUESTION])


def test_a_pipe_that_never_ends_is_not_swallowed_whole(monkeypatch):
    monkeypatch.setattr("edge_runtime.cli.piped.PIPE_LIMIT_BYTES", 10)
    refused_result = CliRunner().invoke(main, ["run", "-", QUESTION], input=b"x" * 11)
    assert refused_result.exit_code == 1
    assert "stdin has more than 10 bytes" in refused_result.stderr


@pytest.mark.skipif(os.name == "nt", reason="no such shell there")
def test_a_real_shell(folder):
    """Process substitution, a picture on stdin that nobody named, a full disk, closed streams."""
    program = f'"{sys.executable}" -m edge_runtime run --greedy --max-tokens 8'

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, cwd=folder, timeout=300, check=False
        )

    found = shell(f"{program} <(cat '{EXAMPLE}') '{QUESTION}'")
    assert found.stdout == "CAFE\n", found.stderr
    unread = shell(f"cat '{EXAMPLE}' | {program} Hi")
    assert unread.returncode == 0
    assert "stdin was not read: name '-'" in unread.stderr
    assert "stdin" not in shell(f"{program} Hi < /dev/null").stderr
    assert shell(f"cat '{EXAMPLE}' | {program} Hi 2> /dev/full").stdout == unread.stdout
    assert shell(f"{program} Hi 2>&- <&-").stdout == unread.stdout
    full = shell(f"{program} Hi > /dev/full")
    assert full.returncode == 1
    assert full.stderr.endswith(
        "edge-runtime: The answer cannot be written: No space left on device; write it elsewhere.\n"
    )
