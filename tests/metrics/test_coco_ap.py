"""COCO AP: equal to pycocotools, and hand-worked cases."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.errors import UserError
from detr.metrics.coco_ap import Accuracy, evaluate, evaluate_json, restrict


def truth(*boxes: tuple[int, int, list[float], int]) -> dict[str, Any]:
    """Ground truth of images 1 and 2 from (image, category, x y w h, crowd)."""
    return {
        "images": [{"id": i, "width": 200, "height": 200, "file_name": "x"} for i in (1, 2)],
        "categories": [{"id": 3, "name": "car"}, {"id": 7, "name": "tram"}],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3],
             "iscrowd": crowd}
            for n, (i, c, b, crowd) in enumerate(boxes)
        ],
    }  # fmt: skip


def result(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def pycocotools_stats(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


def ap_list(ap: Any) -> list[float]:
    values = (ap.ap, ap.ap50, ap.ap75, ap.ap_small, ap.ap_medium, ap.ap_large)
    return [-1.0 if v is None else v for v in values]


def test_equals_pycocotools_on_the_official_fixture(shared_data: Path) -> None:
    folder = shared_data / "coco_eval"
    ground_truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    ap = evaluate_json(ground_truth, results)
    assert ap_list(ap)[:3] == pytest.approx([0.5045806987, 0.6969727247, 0.5729816669], abs=1e-10)
    assert ap_list(ap) == pytest.approx(pycocotools_stats(ground_truth, results)[:6], abs=1e-9)
    assert ap.images == 100
    assert len(ap.per_class) == 80
    known = [c.ap for c in ap.per_class.values() if c.ap is not None]
    assert np.mean(known) == pytest.approx(ap.ap, abs=1e-12)


def test_equals_pycocotools_on_random_boxes_with_crowds() -> None:
    rng = np.random.default_rng(5)
    rows, results = [], []
    for n in range(60):
        x, y, w, h = rng.uniform([0, 0, 4, 4], [120, 120, 80, 80]).tolist()
        image, category = int(rng.integers(1, 3)), int(rng.choice([3, 7]))
        rows.append((image, category, [x, y, w, h], int(n % 9 == 0)))
        for _ in range(2):
            shifted = (np.array([x, y, w, h]) + rng.normal(0, 2, 4)).clip(1).tolist()
            results.append(result(image, category, shifted, float(rng.uniform())))
    ground_truth = truth(*rows)
    expected = pycocotools_stats(ground_truth, results)[:6]
    assert ap_list(evaluate_json(ground_truth, results)) == pytest.approx(expected, abs=1e-9)


def test_perfect_detections_score_one_and_are_left_unchanged() -> None:
    ground_truth = truth((1, 3, [10, 10, 50, 50], 0), (2, 7, [0, 0, 20, 20], 0))
    results = [result(1, 3, [10, 10, 50, 50], 0.9), result(2, 7, [0, 0, 20, 20], 0.4)]
    before = copy.deepcopy((ground_truth, results))
    ap = evaluate_json(ground_truth, results)
    assert (ap.ap, ap.ap50, ap.ap75) == (1.0, 1.0, 1.0)
    assert (ap.ap_small, ap.ap_medium, ap.ap_large) == (1.0, 1.0, None)
    assert {n: c.count for n, c in ap.per_class.items()} == {"car": 1, "tram": 1}
    assert (ground_truth, results) == before


def test_one_false_positive_ranked_first_halves_precision() -> None:
    ap = evaluate_json(
        truth((1, 3, [10, 10, 50, 50], 0)),
        [result(1, 3, [120, 120, 50, 50], 0.9), result(1, 3, [10, 10, 50, 50], 0.5)],
    )
    assert ap.ap50 == pytest.approx(0.5)


def test_a_detection_inside_a_crowd_is_neither_right_nor_wrong() -> None:
    ap = evaluate_json(
        truth((1, 3, [10, 10, 50, 50], 0), (1, 3, [100, 100, 80, 80], 1)),
        [result(1, 3, [120, 120, 20, 20], 0.9), result(1, 3, [10, 10, 50, 50], 0.5)],
    )
    assert ap.ap == 1.0
    assert ap.n_gt == 1


def test_iou_thresholds_count_up_to_the_overlap() -> None:
    # IoU 0.8 exactly fails nothing up to 0.80: seven of the ten thresholds.
    ap = evaluate_json(truth((1, 3, [0, 0, 100, 100], 0)), [result(1, 3, [0, 0, 100, 80.001], 0.5)])
    assert ap.ap == pytest.approx(0.7)


def test_nothing_found_is_zero_and_no_truth_is_an_error() -> None:
    assert evaluate_json(truth((1, 3, [0, 0, 10, 10], 0)), []).ap == 0.0
    with pytest.raises(UserError) as caught:
        evaluate_json(truth((1, 3, [0, 0, 10, 10], 1)), [])
    assert caught.value.code == "no-ground-truth"


def test_nan_score_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        evaluate_json(
            truth((1, 3, [0, 0, 10, 10], 0)), [result(1, 3, [0, 0, 10, 10], float("nan"))]
        )
    assert caught.value.code == "detections-not-finite"
    assert "detection 0 (image 1)" in caught.value.message


def test_restrict_drops_the_other_images() -> None:
    ground_truth = truth((1, 3, [10, 10, 50, 50], 0), (2, 3, [0, 0, 20, 20], 0))
    only = restrict(ground_truth, [2])
    ap = evaluate_json(only, [result(2, 3, [0, 0, 20, 20], 0.5)])
    assert (ap.ap, ap.images, ap.n_gt) == (1.0, 1, 1)


def test_evaluate_needs_one_entry_per_image() -> None:
    with pytest.raises(ValueError, match="1 detections for 2 images"):
        evaluate(_TwoImages(), [None])  # type: ignore[arg-type,list-item]


class _TwoImages:
    def __len__(self) -> int:
        return 2


def test_recall_and_chosen_overlaps_are_pycocotools(shared_data: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder = shared_data / "coco_eval"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    found = evaluate_json(truth, results, Accuracy(max_dets=20, ious=(0.3, 0.75)))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, 20]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"]

    def mean(values: np.ndarray[Any, Any]) -> float:
        return float(values[values > -1].mean())

    expected = [mean(recall[:, :, 0, k]) for k in range(3)]
    assert [found.ar1, found.ar10, found.ar] == pytest.approx(expected, abs=1e-9)
    areas = [mean(recall[:, :, k, 2]) for k in (1, 2, 3)]
    assert [found.ar_small, found.ar_medium, found.ar_large] == pytest.approx(areas, abs=1e-9)
    assert found.ap == pytest.approx(mean(evaluation.eval["precision"][..., 0, 2]), abs=1e-9)
    assert found.at_iou is not None
    assert found.at_iou["0.75"] == pytest.approx(found.ap75)
    assert found.at_iou["0.3"] >= found.ap50


def test_three_hundred_perfect_detections_are_perfect_where_all_of_them_count() -> None:
    boxes = [[float(20 * (k % 20)), float(20 * (k // 20)), 10.0, 10.0] for k in range(300)]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": k + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": 100.0, "iscrowd": 0}
            for k, b in enumerate(boxes)
        ],
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": b, "score": 1 - k / 1000}
        for k, b in enumerate(boxes)
    ]
    usual = evaluate_json(truth, results)
    assert usual.ap == pytest.approx(0.3366, abs=1e-4) and "--max-dets" in usual.note()
    whole = evaluate_json(truth, results, Accuracy(max_dets=300))
    assert (whole.ap, whole.ar, whole.note()) == (pytest.approx(1.0), pytest.approx(1.0), "")
