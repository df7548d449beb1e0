"""``detr predict`` with a bundle that finds masks: painted, as run lengths, and as polygons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from detr.masks import Polygons, Rle, overlap
from detr.types import Detections
from engines import open_engine
from engines.cli import predict

MakeBundle = Callable[..., Path]
SIZE = (40, 60)


def run(*arguments: object) -> None:
    result = CliRunner().invoke(predict, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def picture(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def found_in(bundle: Path, image: Path) -> Detections:
    (found,) = open_engine(bundle)([np.asarray(Image.open(image))])
    assert found.masks is not None and sum(mask.area for mask in found.masks) > 100
    return found


def test_results_have_masks(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle, image = toy_bundle(masks=True), picture(tmp_path / "1.png")
    run(bundle, image, "--out", tmp_path / "out", "--save", "coco", "--save", "yolo", "--score", 0)
    found = found_in(bundle, image)
    assert found.masks is not None
    told = json.loads((tmp_path / "out/coco.json").read_text())
    assert [one["segmentation"] for one in told] == [mask.to_json() for mask in found.masks]
    rows = (tmp_path / "out/labels/1.txt").read_text().splitlines()
    kept = [k for k, mask in enumerate(found.masks) if mask.area]
    assert len(rows) == len(kept)
    for row, k in zip(rows, kept, strict=True):
        label, *corners, score = map(float, row.split())
        polygon = Polygons((np.array(corners).reshape(-1, 2) * SIZE[::-1],))
        assert label == found.labels[k] and abs(score - found.scores[k]) < 1e-5
        # Six digits of a share of the image.
        assert overlap(polygon.rle(SIZE), found.masks[k]) > 0.99


def test_masks_are_painted(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle, image = toy_bundle(masks=True), picture(tmp_path / "1.png")
    drawn = tmp_path / "drawn.png"
    run(bundle, image, "--draw", drawn, "--score", 0)
    found = found_in(bundle, image)
    assert found.masks is not None
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (image, drawn))
    changed = np.abs(before - after).max(2) > 0
    inside = np.any([mask.pixels() for mask in found.masks], 0)
    assert changed[inside].mean() > 0.95
    assert isinstance(found.masks[0], Rle)
