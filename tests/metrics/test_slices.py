"""Slices and confusions by hand, and against COCO's own sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detr.config import ClassMap
from detr.metrics.coco_ap import evaluate_json, to_results
from detr.metrics.confusion import confusion, worst
from detr.metrics.outcomes import GroundTruth, match_detections, precision_curves
from detr.metrics.slices import Slicing, slice_accuracy, wilson
from detr.types import Detections

CLASSES = ClassMap(names=("car", "bus"), category_ids=(3, 7))
Box = tuple[float, float, float, float]


def document(objects: list[tuple[int, int, Box, bool]], images: int) -> dict[str, Any]:
    """Objects as (image, label, x y w h, crowd)."""
    return {
        "images": [{"id": k} for k in range(images)],
        "categories": [{"id": 3, "name": "car"}, {"id": 7, "name": "bus"}],
        "annotations": [
            {
                "id": k + 1, "image_id": image, "category_id": (3, 7)[label], "bbox": list(box),
                "area": box[2] * box[3], "iscrowd": int(crowd),
            }
            for k, (image, label, box, crowd) in enumerate(objects)
        ],
    }  # fmt: skip


def detections(rows: list[tuple[Box, float, int]]) -> Detections:
    """Rows as (x y w h, score, label), best first."""
    boxes = np.array([(x, y, x + w, y + h) for (x, y, w, h), _, _ in rows], np.float32)
    return Detections(
        boxes.reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float32),
        np.array([label for _, _, label in rows], np.int64),
    )


def scene(seed: int, images: int = 12) -> tuple[dict[str, Any], list[Detections]]:
    """Random objects, most of them found with some error, and false alarms."""
    generator = np.random.default_rng(seed)
    objects: list[tuple[int, int, Box, bool]] = []
    found = []
    for image in range(images):
        rows = []
        for k in range(generator.integers(1, 7)):
            w, h = generator.choice([20, 60, 150], 2) * generator.uniform(0.9, 1.1, 2)
            box = (float(170 * (k % 3)), float(170 * (k // 3)), float(w), float(h))
            label = int(generator.integers(2))
            objects.append((image, label, box, bool(generator.random() < 0.1)))
            if generator.random() < 0.8:
                shift = generator.normal(0, 0.05, 4) * (w, h, w, h)
                moved = tuple(float(a + b) for a, b in zip(box, shift, strict=True))
                rows.append((moved, float(generator.random()), label))
            if generator.random() < 0.3:
                rows.append(((600.0, 10.0 + 170 * k, w, h), float(generator.random()), label))
        found.append(detections(sorted(rows, key=lambda row: -row[1])))  # type: ignore[arg-type]
    return document(objects, images), found


@pytest.mark.parametrize("seed", range(4))
def test_all_objects_as_one_slice_are_coco_ap(seed: int) -> None:
    truth, found = scene(seed)
    results = [r for k, one in enumerate(found) for r in to_results(k, one, CLASSES)]
    ap = evaluate_json(truth, results)
    outcomes = match_detections(truth, found)
    everything = Slicing("all", "objects", ["x"] * len(truth["annotations"]), ["x"])
    (row,) = slice_accuracy(everything, truth, outcomes, 0.5).rows
    assert (row.ap, row.ap50, row.objects) == pytest.approx((ap.ap, ap.ap50, ap.n_gt), abs=1e-9)
    whole = Slicing("all", "images", ["x"] * 12, ["x"])
    (row,) = slice_accuracy(whole, truth, outcomes, 0.5).rows
    assert (row.ap, row.images) == pytest.approx((ap.ap, 12), abs=1e-9)
    curves = precision_curves(outcomes, GroundTruth.of(truth))
    assert np.mean([curve.mean() for curve in curves]) == pytest.approx(ap.ap50, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_slices_by_size_are_cocos_sizes(seed: int) -> None:
    truth, found = scene(seed)
    results = [r for k, one in enumerate(found) for r in to_results(k, one, CLASSES)]
    ap = evaluate_json(truth, results)
    outcomes = match_detections(truth, found)

    def size(area: float) -> str:
        return "small" if area < 32**2 else "medium" if area < 96**2 else "large"

    assert outcomes.area is not None
    slicing = Slicing(
        "size", "objects", [size(a["area"]) for a in truth["annotations"]],
        ["small", "medium", "large"], [size(area) for area in outcomes.area],
    )  # fmt: skip
    rows = slice_accuracy(slicing, truth, outcomes, 0.5).rows
    expected = [ap.ap_small, ap.ap_medium, ap.ap_large]
    assert [row.ap for row in rows] == pytest.approx(expected, abs=1e-9)


def test_recall_in_slices_counts_objects_found_with_the_score() -> None:
    objects = [(0, 0, (0, 0, 50, 50), False), (0, 0, (100, 0, 50, 50), False),
               (1, 0, (0, 0, 50, 50), False), (1, 1, (200, 0, 50, 50), True)]  # fmt: skip
    found = [
        detections([((0, 0, 50, 50), 0.9, 0), ((100, 0, 50, 50), 0.2, 0)]),
        detections([((0, 0, 50, 30), 0.8, 0), ((300, 0, 50, 50), 0.7, 0)]),
    ]
    truth = document(objects, 2)  # type: ignore[arg-type]
    slicing = Slicing("distance", "objects", ["near", "far", "far", None], ["near", "far", "sky"])
    near, far, sky = slice_accuracy(slicing, truth, match_detections(truth, found), 0.3).rows
    assert (near.objects, near.found, near.images) == (1, 1, 1)
    # One found below the score, one with IoU 0.6.
    assert (far.objects, far.found, far.images) == (2, 1, 2)
    assert (sky.objects, sky.ap, sky.recall, sky.interval) == (0, None, None, None)
    assert near.ap == 1.0
    assert far.recall == 0.5


def test_the_interval_of_a_share() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)


def test_a_confusion_is_counted_once_where_it_belongs() -> None:
    objects = [
        (0, 0, (0, 0, 50, 50), False),  # found
        (0, 1, (100, 0, 50, 50), False),  # a bus taken for a car
        (0, 0, (200, 0, 80, 50), False),  # missed
        (0, 0, (300, 0, 50, 50), True),  # nothing is wrong here
        (0, 1, (0, 0, 52, 50), False),  # a bus behind the car: its own class goes first
    ]
    found = detections(
        [
            ((0, 0, 51, 50), 0.95, 1),
            ((0, 0, 50, 50), 0.9, 0),
            ((300, 0, 50, 50), 0.85, 0),
            ((100, 0, 50, 50), 0.8, 0),
            ((400, 0, 50, 50), 0.7, 1),
            ((1, 0, 50, 50), 0.6, 0),
            ((500, 0, 50, 50), 0.1, 1),
        ]
    )
    matrix, mistakes = confusion(document(objects, 1), [found], 0.3)  # type: ignore[arg-type]
    assert matrix.counts == [[1, 0, 1], [1, 1, 0], [1, 1, 0]]
    kinds = [(m.kind, m.truth, m.found) for m in worst(mistakes, 3)]
    assert kinds[:3] == [("wrong class", 1, 0), ("false alarm", -1, 1), ("duplicate", -1, 0)]
    assert kinds[-1:] == [("missed", 0, -1)]
    assert worst(mistakes, 3)[-1].weight == 80 * 50


def test_confusion_of_nothing() -> None:
    matrix, mistakes = confusion(document([], 1), [detections([])], 0.3)
    assert sum(map(sum, matrix.counts)) == 0 and mistakes == []
