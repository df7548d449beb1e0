"""``detr predict`` on a hand-made bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from detr.errors import UserError
from engines.cli import predict

MakeBundle = Callable[..., Path]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "road.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(predict, [str(a) for a in arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_json_names_classes_and_sizes(toy_bundle: MakeBundle, picture: Path) -> None:
    answer = json.loads(call(toy_bundle(), picture, picture, "--json", "--score", "0"))
    assert len(answer["predictions"]) == 1  # given twice, answered once
    assert answer["skipped"] == []
    first = answer["predictions"][0]
    assert (first["width"], first["height"]) == (60, 40)
    assert {d["label"] for d in first["detections"]} <= {"car", "tram"}
    assert len(first["detections"]) == 5


def test_score_leaves_out(toy_bundle: MakeBundle, picture: Path) -> None:
    assert "0 found" in call(toy_bundle(), picture, "--score", "1.5")


def test_draw(toy_bundle: MakeBundle, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.png"
    call(toy_bundle(), picture, "--draw", out, "--score", "0")
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (40, 60, 3)
    assert (drawn != np.asarray(Image.open(picture))).any()


def test_draw_never_replaces_the_image_it_read(toy_bundle: MakeBundle, picture: Path) -> None:
    before, bundle = picture.read_bytes(), toy_bundle()
    for same in (picture, picture.parent / "." / ".." / picture.parent.name / picture.name):
        with pytest.raises(UserError) as caught:
            call(bundle, picture, "--draw", same)
        assert caught.value.code == "option-draw" and picture.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--draw", "found.gif"], "option-draw"),
        (["--draw", "/dev/null/found.png"], "output-unwritable"),
    ],
)
def test_bad_draw(toy_bundle: MakeBundle, picture: Path, options: list[str], code: str) -> None:
    with pytest.raises(UserError) as caught:
        call(toy_bundle(), picture, *options)
    assert caught.value.code == code


def test_unreadable_image_is_named(toy_bundle: MakeBundle, tmp_path: Path, picture: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:300])
    with pytest.raises(UserError, match=r"cut\.png") as caught:
        call(toy_bundle(), cut)
    assert caught.value.code == "image-unreadable"
