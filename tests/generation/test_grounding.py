"""Places in pictures: read from answers into pixels, drawn so that they can be seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edge_runtime import ImageError, MessageError, Model
from edge_runtime.answers import Answer
from edge_runtime.generation.grounding import Region, draw_regions, find_regions, save_drawing

TEXT = (
    "The <ref>red cup</ref><box>100 200 400 600</box> stands at <ref> corner </ref>"
    "<quad>0 0 1000 0 1000 1000 0 1000</quad> and here <point>500 250</point>."
)


def answer(text: str, pictures) -> Answer:
    return Answer(text, None, "stop", "m", 1, 1, 0, 1, [], pictures=pictures)


def test_places_are_in_pixels_of_the_original_picture():
    assert find_regions(TEXT, (2000, 500)) == [
        Region("box", "red cup", [(200.0, 100.0), (800.0, 300.0)]),
        Region("quad", "corner", [(0.0, 0.0), (2000.0, 0.0), (2000.0, 500.0), (0.0, 500.0)]),
        Region("point", "corner", [(1000.0, 125.0)]),
    ]


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<box>1 2 3 4<box>", [[(1.0, 2.0), (3.0, 4.0)]]),  # as the authors once wrote it
        ("<box>1, 2, 3, 4</box>", [[(1.0, 2.0), (3.0, 4.0)]]),
        ("<box>(1,2),(3,4)</box>", [[(1.0, 2.0), (3.0, 4.0)]]),
        ("<box>30 40 10 20</box>", [[(10.0, 20.0), (30.0, 40.0)]]),
        ("<box>-5 0.5 1200 4</box>", [[(0.0, 0.5), (1000.0, 4.0)]]),
        ("<box>1 2 3 4</box><box>5 6 7 8", [[(1.0, 2.0), (3.0, 4.0)], [(5.0, 6.0), (7.0, 8.0)]]),
        ("<box>1 2 3</box> <box></box> <box>a b c d</box> <quad>1 2</quad> box 1 2 3 4", []),
        ("", []),
    ],
)
def test_numbers_are_read_with_patience(text, boxes):
    assert [region.points for region in find_regions(text, (1000, 1000))] == boxes


def test_a_label_holds_for_all_boxes_behind_it():
    regions = find_regions(
        "<box>0 0 1 1</box><ref>a</ref><box>1 2 3 4</box>, <box>5 6 7 8</box><ref></ref><box>1 1 2 2</box>", (10, 10)
    )
    assert [region.label for region in regions] == [None, "a", "a", None]


def test_the_last_picture_is_meant_unless_another_is_named():
    made = answer(TEXT, [[1000, 1000], [100, 100]])
    assert made.boxes()[0].bounds == (10.0, 20.0, 40.0, 60.0)
    assert made.boxes(picture=0)[0].bounds == (100.0, 200.0, 400.0, 600.0)
    assert [region.kind for region in made.regions()] == ["box", "quad", "point"]
    for picture in (2, -3):
        with pytest.raises(MessageError, match="2 pictures"):
            made.boxes(picture)
    with pytest.raises(MessageError, match="0 pictures"):
        answer(TEXT, []).regions()


def test_sizes_are_those_of_upright_pictures(exact_model: Model):
    picture = Image.new("RGB", (60, 40))
    picture.getexif()[0x0112] = 6  # turned by 90 degrees
    content = [picture, Image.new("RGB", (30, 20)), "Where?"]
    made = exact_model.chat([{"role": "user", "content": content}], max_tokens=1)
    assert made.pictures == [[40, 60], [30, 20]]


def test_a_question_may_name_what_is_looked_for_as_the_official_code_has_it(exact_model: Model):
    question = "Please provide the bounding box coordinate of the region this sentence describes: <ref>book</ref>"
    prompt = exact_model.build_prompt(question)
    ids = exact_model.tokenizer.special_ids
    assert [prompt.ids.count(ids[tag]) for tag in ("<ref>", "</ref>")] == [1, 1]
    fake = exact_model.build_prompt([{"role": "tool", "content": "<ref>book</ref>"}])
    assert fake.ids.count(ids["<ref>"]) == 0


@pytest.mark.parametrize("size", [(640, 480), (61, 47), (2600, 700), (3, 3)])
@pytest.mark.parametrize("shade", [0, 128, 255])
def test_drawings_show_on_every_background(size, shade):
    plain = Image.new("RGB", size, (shade,) * 3)
    regions = find_regions(
        TEXT + "<ref>杯子</ref><box>0 0 1000 1000</box><ref>café\n" + "x" * 500 + "</ref><box>1 1 1 1</box>", size
    )
    drawn = draw_regions(plain, regions)
    assert drawn.size == size
    assert np.asarray(plain).min() == np.asarray(plain).max() == shade, "the original was drawn on"
    difference = np.abs(np.asarray(drawn).astype(int) - shade).max(axis=2)
    assert (difference > 100).sum() > 0.01 * difference.size


def test_the_lines_are_where_the_box_is():
    size = (400, 400)
    drawn = np.asarray(
        draw_regions(Image.new("RGB", size, "black"), find_regions("<box>250 500 750 750</box>", size))
    )
    rows, cols = np.nonzero(drawn.max(axis=2))
    below_label = rows >= 190
    assert cols[below_label].min() in range(94, 101)
    assert cols[below_label].max() in range(299, 307)
    assert rows.max() in range(299, 307)
    assert drawn[220:280, 120:280].max() == 0, "the inside stays as it is"


def test_a_drawing_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = Image.new("RGB", (8, 8))
    save_drawing(picture, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as written:
        assert written.size == (8, 8)
    for name in ("out", "out.xyz", "out.pdf.doc"):
        with pytest.raises(ImageError, match="suffix"):
            save_drawing(picture, tmp_path / name)
    with pytest.raises(ImageError, match="does not exist"):
        save_drawing(picture, tmp_path / "no" / "out.png")

    def fail(self, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(ImageError, match="the disk is full"):
        save_drawing(picture, tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
