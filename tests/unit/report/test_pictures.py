"""Protects the pictures of sample answers: those of the very samples, small, and none where data have changed."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import reported
from tests.unit.report.conftest import blocks, notes, page_of, report_of
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data import open_source
from theworld_train.report.blocks import Answers
from theworld_train.report.pictures import FRAMES, THUMBNAIL, data_uri, pictures_of


def opened(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


def test_the_frames_are_those_of_the_sample() -> None:
    media, problem = pictures_of(reported.DATA, [reported.answer(5)])
    assert problem is None
    ((clip,),) = media
    sample = open_source(MovingDigitsSource(source="moving_digits", split="eval", samples=8))[5]
    frames = sample.messages[0]["content"][0]["video"]
    assert len(clip) == FRAMES
    assert opened(clip[0]).tobytes() == frames[0].tobytes()
    assert opened(clip[-1]).tobytes() == frames[-1].tobytes()


def test_answers_stand_with_their_clips_on_the_page(run: Path) -> None:
    (answers,) = blocks(report_of(run, pictures=pictures_of), "Sample answers", Answers)
    assert [len(answer.media) for answer in answers.items] == [1] * 8
    page = page_of(run, pictures=pictures_of)
    assert sum(tag == "img" for tag, _ in page.tags) == 8 * FRAMES


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": 400}, "hold no sample 400"),
        ({"index": None}, "hold no sample None"),
        ({"id": "another"}, "sample 1 of the data is now moving-digits-eval-1"),
    ],
)
def test_a_sample_that_is_another_now_has_no_picture(change: dict[str, object], said: str) -> None:
    media, problem = pictures_of(reported.DATA, [reported.answer(0), reported.answer(1) | change])
    assert [len(each) for each in media] == [1, 0]
    assert problem is not None
    assert said in problem


@pytest.mark.parametrize("data", [{"source": "jsonl", "path": "gone.jsonl"}, {"source": "x"}, {}])
def test_data_that_are_gone_leave_the_answers_alone(run: Path, data: dict[str, object]) -> None:
    evaluation = reported.evaluation("projection", run) | {"data": data or {"source": None}}
    reported.write_json(run / "evaluation.json", evaluation)
    report = report_of(run, pictures=pictures_of)
    assert "Images and clips are missing" in notes(report, "Sample answers")
    assert blocks(report, "Sample answers", Answers)


def test_large_pictures_are_made_small_and_pages_do_not_grow_without_bound() -> None:
    image = Image.effect_noise((2000, 1000), 80)
    assert opened(data_uri(image)).size == (THUMBNAIL, THUMBNAIL // 2)
    media, problem = pictures_of(reported.DATA, [reported.answer(0), reported.answer(1)], max_bytes=4000)
    assert [len(each) for each in media] != [1, 1]
    assert problem is not None
    assert "more than 4,000 bytes" in problem
