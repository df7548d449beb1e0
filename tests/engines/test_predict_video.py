"""Videos in and out of ``detr predict``; needs PyAV."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from detr.errors import UserError
from engines.cli import predict
from engines.predict.sources import find_sources
from engines.predict.video import Clock, VideoWriter, read_video

MakeBundle = Callable[..., Path]
FRAMES = 12


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Gray frames, each brighter, of an odd size, the later ones shown for longer."""
    path = tmp_path / "clip.mp4"
    writer = VideoWriter(path)
    for n in range(FRAMES):
        pixels = np.full((45, 63, 3), 10 * n, np.uint8)
        pts = n if n < 6 else 2 * n
        writer.write(pixels, Clock(pts, Fraction(1, 25), Fraction(25)))
    writer.close()
    return path


def test_frames_come_back_in_order_and_on_time(clip: Path) -> None:
    frames = list(read_video(clip))
    assert len(frames) == FRAMES and frames[0][0].shape == (46, 64, 3)
    means = [float(pixels.mean()) for pixels, _ in frames]
    assert means == pytest.approx([10 * n for n in range(FRAMES)], abs=3)
    times = [float(clock.pts * clock.time_base) for _, clock in frames]
    assert times == pytest.approx([n / 25 if n < 6 else 2 * n / 25 for n in range(FRAMES)])


def test_a_video_becomes_a_video_and_an_answer_per_frame(
    toy_bundle: MakeBundle, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = [str(toy_bundle()), str(clip), "--out", str(out), "--score", "0", "--json"]
    options += ["--save", "pictures", "--save", "coco", "--save", "yolo"]
    done = CliRunner().invoke(predict, options, catch_exceptions=False)
    answer = json.loads(done.stdout)
    assert [one["frame"] for one in answer["predictions"]] == list(range(FRAMES))
    results = json.loads((out / "coco.json").read_text())
    assert list(dict.fromkeys(r["image_id"] for r in results))[:2] == ["clip_000000", "clip_000001"]
    assert len(list((out / "labels").iterdir())) == FRAMES
    drawn = list(read_video(out / "pictures/clip.mp4"))
    originals = list(read_video(clip))
    assert [c.pts * c.time_base for _, c in drawn] == [c.pts * c.time_base for _, c in originals]
    assert max(np.abs(drawn[0][0].astype(int) - originals[0][0].astype(int)).ravel()) > 50


def test_a_broken_video_is_skipped(toy_bundle: MakeBundle, clip: Path, tmp_path: Path) -> None:
    broken = tmp_path / "cut.mp4"
    broken.write_bytes(clip.read_bytes()[:200])
    done = CliRunner().invoke(
        predict, [str(toy_bundle()), str(clip), str(broken), "--json"], catch_exceptions=False
    )
    answer = json.loads(done.stdout)
    assert len(answer["predictions"]) == FRAMES
    assert [one["code"] for one in answer["skipped"]] == ["video-unreadable"]


def test_an_image_called_like_a_frame_keeps_its_name(clip: Path) -> None:
    Image.new("RGB", (8, 8)).save(clip.parent / "clip_000003.png")
    names = {one.path.name: one.name for one in find_sources([clip.parent])}
    assert names == {"clip.mp4": "clip_mp4", "clip_000003.png": "clip_000003"}


def test_draw_takes_no_video(toy_bundle: MakeBundle, clip: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        predict, [str(toy_bundle()), str(clip), "--draw", str(tmp_path / "a.png")]
    )
    assert isinstance(result.exception, UserError) and result.exception.code == "option-draw"


def test_a_video_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    writer = VideoWriter(path)
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 250  # the left half is bright
    for n in range(3):
        writer.write(pixels, Clock(n, Fraction(1, 25), Fraction(25)))
    writer.close()
    content = path.read_bytes()
    track = content.index(b"tkhd")
    one, zero, minus = (value.to_bytes(4, "big") for value in (0x10000, 0, 0xFFFF0000))
    upright = one + zero * 3 + one
    clockwise = zero + one + zero + minus + zero
    place = content.index(upright, track)
    path.write_bytes(content[:place] + clockwise + content[place + len(upright) :])
    frame, _ = next(read_video(path))
    assert frame.shape == (64, 48, 3)
    assert frame[:28].min() > 200 and frame[36:].max() < 50
