"""Regions: the same one has the same number in every turn, in the answers and in the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from theworld_train.config.sources import SpatialRgptSource
from theworld_train.data import MediaError, UnreadableSampleError, open_source
from theworld_train.data.regions import COLORS, RegionFormat, draw_regions

WIDE, TALL, SMALL = [10, 20, 90, 40], [60, 5, 80, 45], [5, 5, 9, 9]
WHITE = (255, 255, 255)


def row(**fields: Any) -> dict[str, Any]:
    """A row whose second and third question speak of regions of the turns before, as the data set's rows do."""
    turns = [
        ("human", "<image>\nIs <mask> <depth> wider than <mask> <depth>?"),
        ("gpt", "Yes, Region [0] is wider than Region [1]."),
        ("human", "What about <mask> <depth>?"),
        ("gpt", "Region [0] is the tallest."),
        ("human", "Which of <mask> <depth> and <mask> <depth> is left?"),
        ("gpt", "Region [1], not Region [0]."),
    ]
    return {
        "filename": "a",
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "bbox": [WIDE, TALL, TALL, TALL, SMALL],
        "rle": [{"size": [50, 100], "counts": ""}] * 5,
        **fields,
    }


def texts(adapted: Any) -> list[str]:
    assert adapted.problems == []
    contents = [message["content"] for message in adapted.row["messages"]]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]


def test_a_region_keeps_its_number_through_the_conversation() -> None:
    assert texts(RegionFormat("draw")(row(), 0)) == [
        "Is Region [0] wider than Region [1]?",
        "Yes, Region [0] is wider than Region [1].",
        "What about Region [1]?",
        "Region [1] is the tallest.",
        "Which of Region [1] and Region [2] is left?",
        "Region [2], not Region [1].",
    ]


def test_boxes_as_text_are_thousandths_of_the_image() -> None:
    asked = texts(RegionFormat("text")(row(), 0))
    assert asked[0] == "Is Region [0] (100, 400, 900, 800) wider than Region [1] (600, 100, 800, 900)?"
    assert asked[2] == "What about Region [1] (600, 100, 800, 900)?"
    assert asked[3] == "Region [1] is the tallest."


def test_boxes_beyond_the_image_are_cut_in_text() -> None:
    assert "(0, 0, 1000, 1000)" in texts(RegionFormat("text")(row(bbox=[[-5, -5, 200, 90], *[TALL] * 4]), 0))[0]


def test_text_needs_the_size_of_the_image_and_drawing_does_not() -> None:
    without = {key: value for key, value in row().items() if key != "rle"}
    (problem,) = RegionFormat("text")(without, 0).problems
    assert (problem.key, problem.hint) == ("rle", "use regions: draw")
    assert texts(RegionFormat("draw")(without, 0))[2] == "What about Region [1]?"


def test_masks_without_depth_and_answers_without_regions() -> None:
    turns = [{"from": "human", "value": "<image>\nHow wide is <mask>?"}, {"from": "gpt", "value": "12.57 inches."}]
    assert texts(RegionFormat("draw")(row(conversations=turns, bbox=[WIDE]), 0)) == [
        "How wide is Region [0]?",
        "12.57 inches.",
    ]


def test_an_answer_about_a_region_that_its_question_does_not_name() -> None:
    turns = [*row()["conversations"][:3], {"from": "gpt", "value": "Region [1] is."}]
    (problem,) = RegionFormat("draw")(row(conversations=turns, bbox=[WIDE, TALL, TALL]), 0).problems
    assert problem.key == "conversations[3].value"
    assert problem.message == "the answer speaks of Region [1], and its question names 1 regions"


@pytest.mark.parametrize(
    "box", [[1, 2, 3], [1, 2, 3, float("nan")], [1, 2, 3, "4"], "box", [3, 2, 1, 4], [True, 0, 1, 1]]
)
def test_what_is_no_box_is_refused(box: object) -> None:
    problems = RegionFormat("draw")(row(bbox=[WIDE, TALL, box, TALL, SMALL]), 0).problems
    assert problems[0].key == "bbox[2]"


def test_a_row_without_regions_is_an_ordinary_conversation() -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    adapted = RegionFormat("draw")(row(conversations=turns, bbox=[], rle=[]), 0)
    assert texts(adapted) == ["What?", "A cup."]
    assert adapted.retouch is None


def test_outlines_are_where_the_boxes_are() -> None:
    image = Image.new("RGB", (400, 200), WHITE)
    drawn = draw_regions(image, [(40, 80, 360, 160), (240, 20, 320, 180)], size=None)
    assert image.getcolors() == [(400 * 200, WHITE)]
    first, second = (tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in COLORS[:2])
    assert [drawn.getpixel(place) for place in ((40, 120), (360, 120), (150, 160))] == [first] * 3
    assert [drawn.getpixel(place) for place in ((240, 60), (320, 60), (280, 180))] == [second] * 3
    assert drawn.getpixel((150, 120)) == WHITE
    assert drawn.getpixel((20, 20)) == WHITE


def test_boxes_follow_the_size_of_the_image() -> None:
    box = [(40.0, 80.0, 360.0, 160.0)]
    half = draw_regions(Image.new("RGB", (200, 100), WHITE), box, size=(200, 400))
    whole = draw_regions(Image.new("RGB", (200, 100), WHITE), [(20, 40, 180, 80)], size=None)
    assert half.tobytes() == whole.tobytes()
    rounded = draw_regions(Image.new("RGB", (133, 67), WHITE), box, size=(200, 400))
    assert rounded.size == (133, 67)


def test_numbers_do_not_cover_each_other() -> None:
    """The data set has regions within regions, whose corners all but meet."""
    boxes = [(10.0 + number, 10.0, 300.0, 300.0) for number in range(4)]
    drawn = draw_regions(Image.new("RGB", (400, 400), WHITE), boxes, size=None)
    for color in COLORS[:4]:
        wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        assert sum(count for count, found in drawn.getcolors(400 * 400) if found == wanted) > 100


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2000, 5)])
def test_tiny_and_narrow_images(size: tuple[int, int]) -> None:
    drawn = draw_regions(Image.new("RGB", size, WHITE), [(0, 0, 1, 1)] * 3, size=None)
    assert drawn.size == size


def test_an_image_of_another_shape_or_a_box_outside_of_it() -> None:
    with pytest.raises(MediaError, match=r"the image has 50 x 100 pixels, and its regions are of one of 100 x 50"):
        draw_regions(Image.new("RGB", (50, 100)), [(0, 0, 5, 5)], size=(50, 100))
    with pytest.raises(MediaError, match="region 1 is outside of the image of 50 x 100 pixels"):
        draw_regions(Image.new("RGB", (50, 100)), [(0, 0, 5, 5), (60, 0, 70, 5)], size=None)


def test_the_source_draws_and_names_the_sample_that_it_cannot_draw(tmp_path: Path) -> None:
    import json

    Image.new("RGB", (100, 50), WHITE).save(tmp_path / "a.jpg")
    Image.new("RGB", (50, 100), WHITE).save(tmp_path / "b.png")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(), row(filename="b.png")]))
    for regions, is_drawn in (("draw", True), ("text", False)):
        source = open_source(SpatialRgptSource(source="spatialrgpt", path=str(path), regions=regions))
        assert list(source.check()) == []
        colors = source[0].messages[0]["content"][0]["image"].getcolors()
        assert (colors != [(100 * 50, WHITE)]) == is_drawn
    source = open_source(SpatialRgptSource(source="spatialrgpt", path=str(path)))
    with pytest.raises(UnreadableSampleError, match=r"rows\.json\[1\]: the image has 50 x 100 pixels"):
        source[1]
