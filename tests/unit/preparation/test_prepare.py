"""Protects `prepare`: what it refuses, what it keeps, that it goes on where it was, and that training reads it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.unit.preparation.conftest import Site, picture
from theworld_train import preparation
from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import ParquetSource
from theworld_train.data import open_source
from theworld_train.preparation import Downloader, Report, Settings, output, prepare
from theworld_train.preparation.spool import JOURNAL, Outcome, Spool

FILES = ("rows-00000.parquet", "failed.jsonl", "report.json")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def bomb() -> bytes:
    """The beginning of a PNG of 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b""))
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def settings(site: Site, tmp_path: Path) -> Settings:
    """Rows of every fate: kept, duplicates, and failures of several kinds."""
    for name in ("red", "green", "blue"):
        site.file(f"/{name}.png", picture(name))
    site.file("/red-again.png", picture("red"))
    site.file("/page.png", b"<html>gone</html>")
    site.file("/bomb.png", bomb())
    site.file("/broken.png", picture("red", (64, 64))[:60])
    rows = [
        ("/red.png", "A red one."),
        ("/missing.png", "Not there."),
        ("/green.png", "A green one."),
        ("/red-again.png", "A red one."),  # the same image and text
        ("/red-again.png", "Another text."),
        ("/page.png", "A page."),
        ("/bomb.png", "A bomb."),
        ("/broken.png", "Broken."),
        ("/blue.png", "A blue one."),
    ]
    listed = [{"url": site.url(path), "caption": text} for path, text in rows]
    listed.append({"url": "http://images.example/plain.png", "caption": "Over http."})
    path = write(tmp_path / "rows.jsonl", listed)
    return Settings(path, str(tmp_path / "out"), limits=site.downloader().limits, connections=3)


def kept(out: str) -> list[dict[str, Any]]:
    return [row for shard in sorted(Path(out).glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def contents(out: str) -> dict[str, bytes]:
    return {name: (Path(out) / name).read_bytes() for name in FILES}


def test_what_is_written_is_what_training_reads(site: Site, settings: Settings):
    report = prepare(settings, site.downloader())

    failed = {"HTTP 404": 1, "not an image": 3, "refused URL": 1}
    sizes = sum(len(picture(color)) for color in ("red", "green", "blue"))
    assert report == Report(rows=10, kept=4, duplicates=1, failed=failed, images=3, image_bytes=sizes)
    out = Path(settings.out)
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, ".run.lock", "prepare.json"])
    lines = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"rows.jsonl:{number}" for number in (2, 6, 7, 8, 10)]
    assert [line["reason"] for line in lines] == ["HTTP 404", *["not an image"] * 3, "refused URL"]
    assert "more than 67,108,864 pixels" in lines[2]["detail"]

    source = open_source(ParquetSource(source="parquet", path=str(out)))
    assert list(source.check()) == []
    samples = [source[index] for index in range(len(source))]
    assert [sample.id for sample in samples] == [f"rows.jsonl:{number}" for number in (1, 3, 5, 9)]
    for sample, color in zip(samples, ("red", "green", "red", "blue"), strict=True):
        image, question = sample.messages[0]["content"]
        assert np.array_equal(np.asarray(image["image"]), np.asarray(Image.new("RGB", (8, 6), color)))
        assert question["text"] == "Describe the image."
    assert samples[2].messages[1]["content"] == [{"type": "text", "text": "Another text."}]


def test_unique_images_keep_the_first_row_of_each(site: Site, settings: Settings):
    report = prepare(replace(settings, unique_images=True), site.downloader())
    assert (report.kept, report.duplicates) == (3, 2)


def test_conversations_with_several_images(site: Site, tmp_path: Path):
    red, blue = site.file("/red", picture("red")), site.file("/blue", picture("blue"))
    rows: list[dict[str, Any]] = [
        {
            "id": "two",
            "kind": "change",
            "world": False,
            "images": [blue],
            "messages": [
                {"role": "system", "content": "Be short."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "path": red},
                        {"type": "text", "text": "and"},
                        {"type": "image"},
                        {"type": "image", "path": red},
                    ],
                },
                {"role": "assistant", "content": "Blue."},
            ],
        },
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    settings = Settings(path, str(tmp_path / "out"), format="conversations")
    assert prepare(settings, site.downloader()).kept == 2

    source = open_source(ParquetSource(source="parquet", path=settings.out))
    sample = source[0]
    assert (sample.id, sample.kind, sample.world) == ("two", "change", False)
    content = sample.messages[1]["content"]
    assert [part["type"] for part in content] == ["image", "text", "image", "image"]
    colors = [part["image"].getpixel((0, 0)) for part in content if part["type"] == "image"]
    assert colors == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert source[1].id == "rows.jsonl:2"


@pytest.mark.parametrize("container", ["json", "tsv", "parquet"])
def test_every_container(site: Site, tmp_path: Path, container: str):
    rows = [{"caption": color, "url": site.file(f"/{color}", picture(color))} for color in ("red", "blue")]
    path = tmp_path / f"rows.{container}"
    if container == "json":
        path.write_text(json.dumps(rows))
    elif container == "tsv":
        path.write_text("".join(f"{row['caption']}\t{row['url']}\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert prepare(Settings(str(path), str(tmp_path / "out")), site.downloader()).kept == 2


@pytest.mark.parametrize(("name", "most"), [("GROUP_ROWS", 2), ("GROUP_BYTES", 1)])
def test_rows_come_in_groups(site: Site, settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str, most: int):
    monkeypatch.setattr(output, name, most)
    prepare(settings, site.downloader())
    file = pq.ParquetFile(Path(settings.out) / "rows-00000.parquet")
    assert file.num_row_groups == {"GROUP_ROWS": 2, "GROUP_BYTES": 4}[name]
    assert file.read().column("id").to_pylist() == [f"rows.jsonl:{number}" for number in (1, 3, 5, 9)]


def test_shards_end_when_they_are_full_and_hold_what_one_file_would(site: Site, settings: Settings, tmp_path: Path):
    sizes = [len(picture(color)) for color in ("red", "green", "red", "blue")]
    prepare(replace(settings, shard_bytes=sum(sizes[:2])), site.downloader())
    out = Path(settings.out)
    shards = sorted(out.glob("*.parquet"))
    assert [shard.name for shard in shards] == ["rows-00000.parquet", "rows-00001.parquet"]
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [2, 2]
    whole = replace(settings, out=str(tmp_path / "whole"))
    prepare(whole, site.downloader())
    assert kept(settings.out) == kept(whole.out)
    for streaming in (False, True):
        source = open_source(ParquetSource(source="parquet", path=settings.out, streaming=streaming))
        assert list(source.check()) == []
        assert [source[index].id for index in range(4)] == [f"rows.jsonl:{number}" for number in (1, 3, 5, 9)]


def test_rows_of_several_files_are_told_apart_and_compared(site: Site, tmp_path: Path):
    """Places that are equal in two files give ids of their own, and what repeats in another file is a duplicate."""
    red, blue = (site.file(f"/{color}", picture(color)) for color in ("red", "blue"))
    (tmp_path / "rows").mkdir()
    for name, urls in (("a", [red, blue]), ("b", [blue, red])):
        rows = [{"url": url, "caption": f"text {number}"} for number, url in enumerate(urls)]
        rows.append({"url": red, "caption": "the same in both"})
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / f"{name}.parquet")
    settings = Settings(str(tmp_path / "rows"), str(tmp_path / "out"))
    report = prepare(settings, site.downloader())
    assert (report.rows, report.kept, report.duplicates, report.images) == (6, 5, 1, 2)
    assert [row["id"] for row in kept(settings.out)] == [
        "a.parquet[0]",
        "a.parquet[1]",
        "a.parquet[2]",
        "b.parquet[0]",
        "b.parquet[1]",
    ]
    assert prepare(settings, site.downloader()) == report
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "c.parquet")
    with pytest.raises(ConfigError, match="rows_sha256: the directory was begun with"):
        prepare(settings, site.downloader())


# -- going on ---------------------------------------------------------------------------------------------------------


#: A preparation in a process of its own, which trusts the test's server.
PROCESS = """
import ssl, sys
from theworld_train.preparation import Downloader, Limits, Settings, prepare
rows, out, port, certificate = sys.argv[1:]
limits = Limits(ports=(int(port),))
context = ssl.create_default_context(cafile=certificate)
trusting = Downloader(limits, context=context, resolve=lambda *_: ["127.0.0.1"], judge=lambda _: None)
prepare(Settings(rows, out, connections=1, limits=limits), trusting)
"""


def test_a_run_that_was_killed_goes_on_and_gives_the_same(site: Site, settings: Settings, tmp_path: Path):
    whole = replace(settings, out=str(tmp_path / "whole"))
    prepare(whole, site.downloader())
    page, killed = site.answers["/page.png"], threading.Event()
    site.answers["/page.png"] = lambda handler: killed.wait(60) and None
    out = Path(settings.out)
    journal = out / ".fetched" / JOURNAL

    arguments = [settings.rows, settings.out, str(site.port), str(site.certificate)]
    process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments])
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    killed.set()
    site.answers["/page.png"] = page

    assert not any((out / name).exists() for name in FILES)
    done = {json.loads(line)["url"] for line in journal.read_bytes().splitlines()}
    assert len(done) == 4
    # What a kill at another moment leaves: half a line, half an image, half an output.
    with journal.open("ab") as file:
        file.write(b'{"url": "https://im')
    (out / ".fetched" / ".half.1").write_bytes(b"\x89PNG")
    (out / ".rows-00000.parquet.partial").write_bytes(b"PAR1")

    site.asked.clear()
    said: list[str] = []
    prepare(replace(settings, connections=7), site.downloader(), lambda line: said.append(str(line)))
    assert said[0] == "going on: 4 URLs are done"
    assert not {site.url(path) for path in site.asked} & done
    assert site.asked
    assert contents(settings.out) == contents(whole.out)


def test_a_kill_while_writing_leaves_no_final_name(site: Site, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "read", lambda self, digest: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, site.downloader())
    assert not any((Path(settings.out) / name).exists() for name in FILES)
    site.asked.clear()
    assert prepare(settings, site.downloader()).kept == 4
    assert site.asked == {}


def test_a_complete_directory_is_only_reported(site: Site, settings: Settings):
    report = prepare(settings, site.downloader())
    before, asked = contents(settings.out), site.asked.copy()
    assert prepare(settings, site.downloader()) == report
    assert (contents(settings.out), site.asked) == (before, asked)


def test_a_url_is_asked_for_once(site: Site, settings: Settings):
    prepare(settings, site.downloader())
    assert set(site.asked.values()) == {1}


def test_an_image_that_was_lost_is_fetched_again(tmp_path: Path):
    with Spool(tmp_path) as spool:
        digest = spool.keep(b"data")
        spool.record(Outcome("https://a", 4, sha256=digest))
    path = tmp_path / digest[:2] / digest[2:]
    path.write_bytes(b"dat")
    with Spool(tmp_path) as spool:
        assert spool.outcomes == {}
    path.write_bytes(b"date")  # the size is right; reading finds it
    with Spool(tmp_path) as spool, pytest.raises(OSError, match="damaged"):
        spool.read(spool.outcomes["https://a"].sha256 or "")


def test_the_journal_goes_on_after_half_a_line(tmp_path: Path):
    outcomes = [Outcome(f"https://{name}.example/", 0, reason="HTTP 404", detail="") for name in "abc"]
    for outcome in outcomes:
        with Spool(tmp_path) as spool:
            spool.record(outcome)
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(b'{"url": "' + b"x" * 500)
    with Spool(tmp_path) as spool:
        assert list(spool.outcomes.values()) == outcomes
    assert (tmp_path / JOURNAL).read_bytes().count(b"\n") == 3
    assert b"xxx" not in (tmp_path / JOURNAL).read_bytes()


def test_all_downloads_end_at_their_most_bytes_and_go_on(site: Site, settings: Settings):
    few = replace(settings, max_total_bytes=len(picture("red")) + 10, connections=1)
    with pytest.raises(ConfigError, match="--max-total-bytes: the downloads have reached"):
        prepare(few, site.downloader())
    assert not (Path(settings.out) / "rows-00000.parquet").exists()
    first = site.asked["/red.png"]
    assert prepare(settings, site.downloader()).kept == 4
    assert site.asked["/red.png"] == first == 1


# -- wrong inputs -----------------------------------------------------------------------------------------------------

ROW = {"url": "https://images.example/a.png", "caption": "A."}


class Untouched(Downloader):
    """Fails a test that connects."""

    def fetch(self, url: str, spend: Callable[[int], None] = lambda count: None) -> bytes:
        raise AssertionError(f"{url} was asked for")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"uri": "https://a.example/b", "caption": "x"}], {}, "url: the row names no image.*did you mean 'uri'"),
        ([{"url": "https://a.example/b", "captions": "x"}], {}, "caption: expected a caption.*did you mean 'captions'"),
        ([ROW, {**ROW, "caption": " "}], {}, "rows.jsonl:2: caption: expected a caption"),
        ([{**ROW, "url": 7}], {}, "url: expected the URL of an image .got 7"),
        ([{**ROW, "url": "http://a.example/b"}], {}, "no row names an image that can be fetched.*not an https URL"),
        ([], {}, "holds no rows"),
        ([ROW], {"format": "caption"}, "--format: unknown format .*did you mean 'captions'"),
        ([ROW], {"format": "conversations"}, "the row has no 'messages'"),
        ([ROW], {"rows": "none.jsonl"}, "none.jsonl: no such file"),
        ([ROW], {"rows": __file__}, "files named .json, .jsonl, .parquet, .tsv"),
    ],
)
def test_wrong_rows_are_told_before_the_first_connection(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        prepare(replace(Settings(path, str(tmp_path / "out")), **changes), Untouched())
    assert not (tmp_path / "out").exists()


def test_clips_and_repeated_ids_are_refused(tmp_path: Path):
    turns = [
        {"role": "user", "content": [{"type": "video", "path": "a.mp4"}]},
        {"role": "assistant", "content": "x"},
    ]
    path = write(tmp_path / "rows.jsonl", [{"id": 1, "messages": turns}, {"id": 1, "messages": turns}])
    with pytest.raises(ConfigError) as caught:
        prepare(Settings(path, str(tmp_path / "out"), format="conversations"), Untouched())
    messages = [problem.message for problem in caught.value.problems]
    clips = "clips are not fetched, only images"
    assert messages == [clips, clips, f"the id is already that of {path}:1"]


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [ROW])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    for name in (out, out / "thesis.tex"):
        with pytest.raises(ConfigError, match="OUT: exists, and was not written by this command"):
            prepare(Settings(path, str(name)), Untouched())
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


def test_other_settings_do_not_go_on(site: Site, settings: Settings):
    prepare(settings, site.downloader())
    with pytest.raises(ConfigError) as caught:
        prepare(replace(settings, unique_images=True, questions=("What?",)), Untouched(settings.limits))
    assert [problem.key for problem in caught.value.problems] == ["questions", "unique_images"]


def test_nothing_kept_is_an_error_that_says_why(site: Site, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"url": site.url("/none"), "caption": "x"}])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"failed.jsonl: no row could be kept.*HTTP 404 1"):
            prepare(Settings(path, str(tmp_path / "out")), site.downloader())
    assert not list((tmp_path / "out").glob("*.parquet"))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_passes_its_options_on(site: Site, settings: Settings, monkeypatch: pytest.MonkeyPatch):
    from theworld_train.cli.app import app

    monkeypatch.setattr(preparation, "Downloader", lambda limits: site.downloader(**vars(limits)))
    options = ["--port", str(site.port), "--unique-images", "--question", "What is it?", "--max-seconds", "5"]
    result = CliRunner().invoke(app, ["prepare", settings.rows, settings.out, *options])
    assert result.exit_code == 0, result.output
    written, report = result.stdout.splitlines()
    assert written == f"written: {settings.out}, for source: parquet"
    assert report.startswith("10 rows: 3 kept, 2 duplicates, 5 failed (HTTP 404 1, not an image 3, refused URL 1);")
    record = json.loads((Path(settings.out) / "prepare.json").read_text())
    assert (record["ports"], record["questions"]) == ([site.port], ["What is it?"])
