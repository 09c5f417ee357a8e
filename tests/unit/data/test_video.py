"""Clips: which frames are taken, and that nothing but the file itself is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from theworld_train.config.errors import ConfigError
from theworld_train.data import MediaError
from theworld_train.data.video import Timing, clip_length, frame_files, read_clip, read_frames, select_frames


def write_video(path: Path, frames: int, codec: str = "mpeg4", size: tuple[int, int] = (64, 48)) -> Path:
    """Writes a video whose frame i has the brightness 10 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 10 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def numbers(frames: list[Image.Image]) -> list[int]:
    """Returns which frame of `write_video` each of the images is."""
    return [round(float(np.asarray(frame).mean()) / 10) for frame in frames]


def test_the_number_of_frames_is_the_largest_that_fits() -> None:
    for available in range(1, 40):
        for max_frames in range(1, 20):
            chosen = select_frames(available, max_frames)
            limit = min(available, max_frames)
            assert len(chosen) == max(n for n in range(1, limit + 1) if n % 4 == 1)
            assert chosen[-1] == available - 1
            assert chosen == sorted(set(chosen))
            assert chosen[0] >= 0


def test_frames_are_spread_evenly_over_the_clip() -> None:
    assert select_frames(9, 9) == list(range(9))
    assert select_frames(17, 9) == list(range(0, 17, 2))
    assert select_frames(101, 5) == [0, 25, 50, 75, 100]
    for available in range(5, 60):
        gaps = np.diff(select_frames(available, 9))
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("available", [1, 2, 3, 4])
def test_a_clip_that_is_too_short_is_its_last_frame(available: int) -> None:
    assert select_frames(available, 9) == [available - 1]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "mpeg4"), (".mkv", "mpeg4"), (".avi", "mpeg4"), (".webm", "libvpx")]
)
def test_a_video_file(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", 21, codec)
    frames = read_clip(path, 5)
    assert numbers(frames) == [0, 5, 10, 15, 20]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.parametrize(("available", "expected"), [(1, [0]), (3, [2]), (7, [0, 2, 3, 5, 6]), (9, list(range(9)))])
def test_short_video_files(tmp_path: Path, available: int, expected: list[int]) -> None:
    assert numbers(read_clip(write_video(tmp_path / "a.mp4", available), 9)) == expected


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        (Timing(window_s=0.8), [12, 14, 16, 18, 20]),
        (Timing(sample_fps=2.5), [4, 8, 12, 16, 20]),
        (Timing(sample_fps=100), [16, 17, 18, 19, 20]),
        (Timing(window_s=0.1, directory_fps=1000), [20]),
    ],
)
def test_frames_of_a_video_file_by_time(tmp_path: Path, timing: Timing, expected: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", 21)  # of 10 frames a second
    assert numbers(read_clip(path, 5, timing)) == expected
    assert clip_length(path, 5, timing) == len(expected)


def test_frames_by_time_end_in_the_last_and_lie_within_the_clip() -> None:
    for available in range(1, 40):
        for seconds in (0.05, 0.3, 1.0, 2.7):
            for timing in (Timing(window_s=seconds), Timing(sample_fps=1 / seconds)):
                for rate in (1.0, 7.0, 29.97):
                    chosen = select_frames(available, 9, timing, rate)
                    assert chosen == sorted(set(chosen))
                    assert len(chosen) % 4 == 1
                    assert chosen[0] >= 0
                    assert chosen[-1] == available - 1
                    if timing.window_s is not None:
                        assert chosen[-1] - chosen[0] <= seconds * rate + 1e-6
                    else:
                        gaps = np.diff(chosen)
                        assert all(abs(gap - max(rate * seconds, 1)) < 1 for gap in gaps)


def test_a_container_with_wrong_or_more_packets_than_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 9)
    for wrong in (0, 5, 30):
        monkeypatch.setattr("theworld_train.data.video._count_packets", lambda _file, _name, wrong=wrong: wrong)
        assert numbers(read_clip(path, 5)) == [0, 2, 4, 6, 8]


def test_directories_follow_the_same_rule_in_name_order(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for number in range(7):
        write_image(f"clip/{number:03}.{'png' if number % 2 else 'bmp'}", (10 * number,) * 3)
    (tmp_path / "clip" / "notes.txt").write_text("x")
    (tmp_path / "clip" / ".hidden.png").write_text("x")
    assert len(frame_files(tmp_path / "clip")) == 7
    assert numbers(read_clip(tmp_path / "clip", 5)) == [0, 2, 3, 5, 6]


def test_lists_of_frames_keep_their_order(write_image: Callable[..., Path]) -> None:
    paths = [write_image(f"{number}.png", (10 * number,) * 3) for number in range(5)]
    assert numbers(read_frames(paths[::-1], 5)) == [4, 3, 2, 1, 0]


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="holds no frames"):
        read_clip(tmp_path, 5)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\0" * 5000])
def test_a_file_that_is_no_video_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=str(path)):
        read_clip(path, 5)


def test_a_truncated_video_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 9)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=str(path)):
        read_clip(path, 5)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.mp4"):
        read_clip(tmp_path / "a.mp4", 5)


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="holds no video"):
        read_clip(path, 5)


def test_playlists_that_name_other_files_are_refused(tmp_path: Path) -> None:
    video = write_video(tmp_path / "secret.ts", 9, "mpeg2video")
    assert numbers(read_clip(video, 5)) == [0, 2, 4, 6, 8]
    playlists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {video.name}\n",
        "remote": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    }
    for name, text in playlists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        with pytest.raises(MediaError, match=name):
            read_clip(path, 5)


def test_large_frames_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr("theworld_train.data.video.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError, match="the frames have more than 3,071 pixels"):
        read_clip(path, 5)


def test_without_the_decoder_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr("theworld_train.data.video.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'theworld-train\[video\]'"):
        read_clip(path, 5)


# -- the present, and what comes after it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "later", "expected"),
    [
        (1.0, False, [0, 5, 10, 15, 20]),
        (1.0, True, [20]),
        (0.0, True, [0, 5, 10, 15, 20]),
        (0.0, False, [0]),
        (0.5, False, [0, 2, 5, 8, 10]),
        (0.5, True, [10, 12, 15, 18, 20]),
        (0.2, False, [0, 1, 2, 3, 4]),
        (0.15, False, [3]),
        (0.15, True, [3, 7, 11, 15, 20]),
    ],
)
def test_frames_up_to_the_present_and_from_it_on(present: float, later: bool, expected: list[int]) -> None:
    chosen = select_frames(21, 5, Timing(present=present, later=later))
    assert chosen[0 if later else -1] == round(20 * present)
    if expected[-1] - expected[0] in (10, 17):
        gaps = np.diff(chosen)
        assert (len(chosen), chosen[0], chosen[-1]) == (5, expected[0], expected[-1])
        assert gaps.max() - gaps.min() <= 1
    else:
        assert chosen == expected


def test_the_future_is_history_read_backwards() -> None:
    for available in range(1, 40):
        for most in (1, 5, 9):
            for timing in (Timing(), Timing(window_s=0.7), Timing(sample_fps=3)):
                past = select_frames(available, most, timing, 10.0)
                later = select_frames(available, most, replace(timing, present=0.0, later=True), 10.0)
                assert later == [available - 1 - index for index in reversed(past)]


def test_history_and_future_share_the_present_alone() -> None:
    for available in range(1, 40):
        for present in (0.0, 0.3, 0.5, 1.0):
            past = select_frames(available, 9, Timing(present=present))
            later = select_frames(available, 9, Timing(present=present, later=True))
            assert set(past) & set(later) == {past[-1]} == {later[0]}


@pytest.mark.parametrize(
    ("timing", "available", "message"),
    [
        (Timing(exact=True), 8, "has 8 frames up to the present, and 2 world steps need 9, 1 + 4 x 2"),
        (Timing(exact=True, present=0.5), 15, "has 8 frames up to the present, and 2 world steps need 9"),
        (Timing(exact=True, present=0.5, later=True), 16, "has 8 frames from the present on, and 2 world steps need 9"),
        (Timing(exact=True, window_s=0.5), 30, "has 30 frames up to the present, of which the source's rule of time "),
    ],
)
def test_too_few_frames_are_counted(timing: Timing, available: int, message: str) -> None:
    with pytest.raises(MediaError, match=re.escape(message)):
        select_frames(available, 9, timing, 10.0)


def test_a_clip_that_is_too_short_is_named(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    timing = Timing(present=0.0, later=True, exact=True)
    video = write_video(tmp_path / "a.mp4", 7)
    frames = [write_image(f"clip/{number}.png") for number in range(4)]
    needed = r"the clip has {} frames from the present on, and 2 world steps need 9, 1 \+ 4 x 2"
    for read in (read_clip, clip_length):
        with pytest.raises(MediaError, match=rf"{video}: " + needed.format(7)):
            read(video, 9, timing)
        with pytest.raises(MediaError, match=rf"{tmp_path / 'clip'}: " + needed.format(4)):
            read(tmp_path / "clip", 9, timing)
    with pytest.raises(MediaError, match=rf"{frames[0]}: " + needed.format(4)):
        read_frames(frames, 9, timing=timing)
    assert numbers(read_clip(write_video(tmp_path / "b.mp4", 9), 9, timing)) == list(range(9))
