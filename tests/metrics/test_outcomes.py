"""Matching and AP agree with the evaluator; resampled images give the spread of a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.config import ClassMap
from detr.errors import UserError
from detr.metrics import coco_ap
from detr.metrics.coco_ap import evaluate_json, to_results
from detr.metrics.outcomes import GroundTruth, average_precision, match_detections, pack, unpack
from detr.types import Detections

CLASSES = ClassMap(names=("a", "b", "c"), category_ids=(3, 7, 9))


def scene(images: int, seed: int, noise: float = 6.0) -> tuple[dict[str, Any], list[Detections]]:
    """Boxes, crowds and detections around them, with false ones and equal scores among them."""
    generator = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [{"id": 10 + i} for i in range(images)],
        "annotations": [],
        "categories": [
            {"id": i, "name": n} for i, n in zip(CLASSES.category_ids, CLASSES.names, strict=True)
        ],
    }
    found = []
    for image in truth["images"]:
        boxes, labels = [], []
        for _ in range(generator.integers(0, 8)):
            x, y, w, h = generator.uniform([0, 0, 20, 20], [200, 200, 90, 90])
            label = int(generator.integers(0, 3))
            crowd = int(generator.random() < 0.2)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1, "image_id": image["id"],
                    "category_id": CLASSES.category_ids[label], "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": crowd,
                }
            )  # fmt: skip
            for _ in range(generator.integers(0, 3)):
                box = np.array([x, y, x + w, y + h]) + generator.normal(0, noise, 4)
                boxes.append(box)
                labels.append(label if generator.random() < 0.8 else int(generator.integers(0, 3)))
        for _ in range(generator.integers(0, 5)):
            x, y = generator.uniform(0, 200, 2)
            boxes.append(np.array([x, y, x + 30, y + 40]))
            labels.append(int(generator.integers(0, 3)))
        scores = np.round(generator.uniform(size=len(boxes)), 1).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        found.append(
            Detections(
                np.array(boxes, np.float32).reshape(-1, 4)[order],
                scores[order],
                np.array(labels, np.int64)[order],
            )
        )
    return truth, found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("inverted", [False, True])
def test_ap_is_the_evaluators(seed: int, inverted: bool) -> None:
    truth, found = scene(12, seed)
    if inverted:  # boxes of negative width, which are no false detections
        for one in found:
            one.boxes[::3, 2] = one.boxes[::3, 0] - 20
    results = [
        entry
        for image, one in zip(truth["images"], found, strict=True)
        for entry in to_results(image["id"], one, CLASSES)
    ]
    expected = evaluate_json(truth, results).ap
    assert average_precision(match_detections(truth, found), GroundTruth.of(truth))[
        0
    ] == pytest.approx(expected, abs=1e-9)


def test_an_image_twice_counts_twice() -> None:
    truth, found = scene(6, 3)
    weights = np.array([[2, 1, 1, 0, 1, 1]])
    kept = [0, 0, 1, 2, 4, 5]
    repeated: dict[str, Any] = {
        "images": [{"id": k} for k in range(6)],
        "annotations": [
            {**entry, "id": 100 * k + entry["id"], "image_id": k}
            for k, i in enumerate(kept)
            for entry in truth["annotations"]
            if entry["image_id"] == truth["images"][i]["id"]
        ],
        "categories": truth["categories"],
    }
    again = [found[i] for i in kept]
    assert average_precision(match_detections(truth, found), GroundTruth.of(truth), weights)[
        0
    ] == pytest.approx(
        average_precision(match_detections(repeated, again), GroundTruth.of(repeated))[0], abs=1e-12
    )


def test_nothing_found_and_nothing_to_find() -> None:
    truth, _ = scene(4, 0)
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    matches = match_detections(truth, [none] * 4)
    assert average_precision(matches, GroundTruth.of(truth))[0] == 0.0
    empty = {**truth, "annotations": []}
    assert np.isnan(
        average_precision(match_detections(empty, [none] * 4), GroundTruth.of(empty))[0]
    )


def test_more_than_a_hundred_of_a_class_are_cut_as_coco_does() -> None:
    truth, _ = scene(1, 1)
    entry = {**(truth["annotations"] or [{}])[0]}
    entry |= {"id": 1, "image_id": 10, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500}
    truth["annotations"] = [{**entry, "iscrowd": 0}]
    boxes = np.tile(np.array([100, 100, 120, 120], np.float32), (101, 1))
    boxes[100] = 0, 0, 50, 50
    found = Detections(boxes, np.linspace(1, 0.5, 101).astype(np.float32), np.zeros(101, np.int64))
    assert average_precision(match_detections(truth, [found]), GroundTruth.of(truth))[0] == 0.0
    assert coco_ap.evaluate_json(truth, to_results(10, found, CLASSES)).ap == 0.0


def test_round_trip_and_fingerprint(tmp_path: Path) -> None:
    truth, found = scene(5, 2)
    matches = match_detections(truth, found)
    path = tmp_path / "matches.npz"
    path.write_bytes(pack(GroundTruth.of(truth), {"a/x.bundle": matches}))
    back, models = unpack(path)
    assert back.fingerprint == GroundTruth.of(truth).fingerprint
    np.testing.assert_array_equal(models["a/x.bundle"].right, matches.right)
    assert average_precision(models["a/x.bundle"], back)[0] == pytest.approx(
        average_precision(matches, GroundTruth.of(truth))[0]
    )
    truth["annotations"][0]["bbox"][0] += 1
    assert GroundTruth.of(truth).fingerprint != back.fingerprint
    path.write_bytes(b"junk")
    with pytest.raises(UserError) as caught:
        unpack(path)
    assert caught.value.code == "matches-unreadable"
