"""AP of masks beside that of boxes, and masks in the pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bench.run as bench_run
from bench.report.html import render_html
from bench.report.markdown import render_markdown
from bench.report.model import Report
from detr.data.convert import convert
from detr.masks import of_box
from detr.types import Detections, ImageArray


@pytest.fixture
def with_masks(bright_cars: Path, tmp_path: Path) -> Path:
    """The road as a COCO set; objects fill their boxes, but for two fifths of the first."""
    convert(f"kitti:{bright_cars}:val", f"coco:{tmp_path / 'coco'}:val", link=True)
    path = tmp_path / "coco" / "annotations" / "instances_val.json"
    document = json.loads(path.read_text())
    names = {"Car", "Pedestrian"}
    document["categories"] = [row for row in document["categories"] if row["name"] in names]
    document["annotations"] = [row for row in document["annotations"] if not row["iscrowd"]]
    for number, row in enumerate(document["annotations"]):
        x, y, w, h = row["bbox"]
        y, h = (y + 0.4 * h, 0.6 * h) if number == 0 else (y, h)
        row["segmentation"] = of_box((x, y, x + w, y + h)).to_json()
    path.write_text(json.dumps(document))
    return tmp_path / "coco"


def finds_masks(engine_type: type[Any], of: Any) -> Any:
    """The engine, with a box's pixels as its mask."""

    class WithMasks(engine_type):  # type: ignore[misc]
        def __call__(self, images: Sequence[ImageArray]) -> list[Detections]:
            return [
                Detections(
                    *(found.boxes, found.scores, found.labels),
                    tuple(of_box(tuple(box)).rle(image.shape[:2]) for box in found.boxes.tolist()),
                )
                for image, found in zip(images, super().__call__(images), strict=True)
            ]

    return WithMasks(of.artifact, of.shift)


def test_masks_beside_boxes(
    engines: dict[str, Any], engine_type: type[Any], with_masks: Path
) -> None:
    engines["teacher"] = finds_masks(engine_type, engines["teacher"])
    models = [engine.artifact for engine in engines.values()]
    report = bench_run.benchmark(models, f"coco:{with_masks}:val", iterations=1)
    teacher, student = report.rows
    assert student.masks is None and teacher.masks is not None
    # One of six masks has an IoU of 0.6.
    assert teacher.coco.ap == 1 and 0.6 < teacher.masks.ap75 < teacher.masks.ap50 == 1
    text, page = render_markdown(report), render_html(report)
    assert "| masks |" in text and "Masks of teacher: AP" in page
    first = report.examples[0].pictures
    assert len({picture.uri for picture in first}) == 3
    bare = bench_run.benchmark(models[1:], f"coco:{with_masks}:val", iterations=1)
    assert "| masks |" not in render_markdown(bare) and "Masks of" not in render_html(bare)
    # The student's box lies elsewhere, but the ground truth is drawn without masks, too.
    assert bare.examples[0].pictures[0].uri != first[0].uri


def test_labels_without_masks(
    engines: dict[str, Any],
    engine_type: type[Any],
    bright_cars: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines["teacher"] = finds_masks(engine_type, engines["teacher"])
    models = [engines["teacher"].artifact]
    report = bench_run.benchmark(models, f"kitti:{bright_cars}:val", iterations=1)
    assert report.rows[0].masks is None
    assert "masks are not scored" in capsys.readouterr().err


def test_the_time_of_masks_is_told_apart(report: Report) -> None:
    row = report.rows[1]
    row.masks = row.coco
    row.latency = row.latency.model_copy(update={"masks": row.latency.engine})
    told = f"{row.latency.engine.p50_ms:.1f}"
    text, page = render_markdown(report), render_html(report)
    assert "enlarging them, p50 ms |" in text and f"| {told} |" in text
    assert "bringing them to the image's size takes" in page
    head, *lines = csv.reader(report.to_csv().splitlines())
    column = head.index("masks_p50_ms")
    assert [line[column] for line in lines] == ["", str(row.latency.engine.p50_ms), ""]
    again = Report.model_validate_json(report.to_json()).rows[1].latency
    assert again.masks == row.latency.masks
