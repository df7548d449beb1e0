"""The comparison of detections sees what matters and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from detr.masks import of_box
from detr.types import Detections
from engines.parity import Budget
from export.parity.compare import compare_detections


def found(*rows: tuple[float, int, tuple[float, float, float, float]]) -> Detections:
    rows = tuple(sorted(rows, key=lambda row: -row[0]))
    return Detections(
        np.array([box for _, _, box in rows], np.float32).reshape(-1, 4),
        np.array([score for score, _, _ in rows], np.float32),
        np.array([label for _, label, _ in rows], np.int64),
    )


CAR = (0.9, 0, (10.0, 10.0, 50.0, 40.0))
VAN = (0.8, 1, (60.0, 10.0, 90.0, 40.0))
TRAM = (0.7, 2, (0.0, 50.0, 90.0, 90.0))
ALL = found(CAR, VAN, TRAM)
FEW = Budget(detections=1, score=1e-3)


def shifted(row: tuple[float, int, tuple[float, ...]], by: float) -> tuple[float, int, tuple]:
    return (row[0], row[1], tuple(x + by for x in row[2]))


def test_equal_is_equal() -> None:
    parity = compare_detections([ALL, found()], [ALL, found()])
    assert (parity.images, parity.matched, parity.violations(FEW)) == (2, 3, [])


def test_order_of_equal_scores_does_not_matter() -> None:
    a = Detections(ALL.boxes, np.full(3, 0.5, np.float32), ALL.labels)
    b = Detections(ALL.boxes[::-1], np.full(3, 0.5, np.float32), ALL.labels[::-1])
    assert compare_detections([a], [b]).violations(FEW) == []


@pytest.mark.parametrize(
    ("candidate", "figure", "value"),
    [
        (found(CAR, VAN), "missing", 1),
        (found(CAR, VAN, TRAM, (0.6, 0, (60, 60, 80, 80))), "extra", 1),
        (found(CAR, (0.8, 2, VAN[2]), TRAM), "class_flips", 1),
        (found(shifted(CAR, 0.6), VAN, TRAM), "max_box_px", 0.6),
        (found((0.898, 0, CAR[2]), VAN, TRAM), "max_score", 0.002),
        (found(shifted(CAR, 40), VAN, TRAM), "missing", 1),
        (found(CAR, CAR, VAN, TRAM), "extra", 1),
        (found((0.9, 0, (np.nan, 0, 5, 5)), VAN, TRAM), "missing", 1),
        (found((0.9, 0, (np.nan, 0, 5, 5)), VAN, TRAM), "not_finite", 1),
    ],
)
def test_each_kind_of_difference(candidate: Detections, figure: str, value: float) -> None:
    parity = compare_detections([ALL], [candidate], FEW)
    assert getattr(parity, figure) == pytest.approx(value, abs=1e-5)
    assert len(parity.violations(FEW)) >= 1


def test_worst_image_is_named() -> None:
    candidate = [ALL, ALL, found(CAR, VAN), ALL]
    assert compare_detections([ALL] * 4, candidate).worst_image == 2


def test_falling_to_the_other_side_of_the_threshold_is_no_loss() -> None:
    many = [(0.5, 0, (float(i * 20), 0.0, i * 20 + 10.0, 9.0)) for i in range(10)]
    a = found(*many, (0.3001, 0, (500.0, 0, 520, 20)))
    b = found(*many, (0.2999, 0, (500.0, 0, 520, 20)))
    for first, second in ((a, b), (b, a)):
        parity = compare_detections([first], [second], FEW)
        assert parity.violations(FEW) == []
        assert parity.matched == 11
    assert compare_detections([a], [found(*many)], FEW).missing == 1


def test_a_timid_model_is_compared_all_the_same() -> None:
    timid = found((0.02, 0, CAR[2]), (0.01, 1, VAN[2]))
    assert compare_detections([timid], [timid]).matched == 2
    assert compare_detections([timid], [found((0.02, 0, CAR[2]))]).missing == 1


def test_boxes_without_area_match_by_place() -> None:
    flat = found((0.9, 0, (10, 10, 10, 30)), (0.8, 0, (40, 10, 40, 30)))
    assert compare_detections([flat], [flat]).violations(FEW) == []
    moved = found((0.9, 0, (10, 10, 10, 30)), (0.8, 0, (45, 10, 45, 30)))
    assert compare_detections([flat], [moved]).missing == 1


def test_not_a_number_is_over_budget() -> None:
    broken = found((np.nan, 0, CAR[2]), VAN, TRAM)
    assert compare_detections([ALL], [broken]).violations(Budget(detections=1, missing=1.0))


def masked(detections: Detections, by: float = 0.0, until: int = 3) -> Detections:
    """With the pixels of each box as its mask, those of the first ones moved to the right."""
    boxes = detections.boxes.tolist()
    masks = tuple(
        of_box((x0 + by * (k < until), y0, x1 + by * (k < until), y1)).rle((100, 100))
        for k, (x0, y0, x1, y1) in enumerate(boxes)
    )
    return Detections(detections.boxes, detections.scores, detections.labels, masks)


def test_masks_are_compared_by_the_pixels_they_share() -> None:
    same = compare_detections([masked(ALL)], [masked(ALL)], FEW)
    assert (same.min_mask_iou, same.median_mask_iou, same.violations(FEW)) == (1, 1, [])
    # Of three masks the first is moved by a quarter of its width.
    one = compare_detections([masked(ALL)], [masked(ALL, 10, 1)], FEW)
    assert one.min_mask_iou == pytest.approx(30 / 50) and one.median_mask_iou == 1
    assert one.violations(FEW) == ["0.6 IoU of a mask (at least 0.9)"]
    assert one.deviating == (0,) and "mask IoU from 0.6000 (median 1.0000)" in one.summary()
    every = compare_detections([masked(ALL)], [masked(ALL, 1)], FEW)
    assert any("median IoU of masks" in reason for reason in every.violations(FEW))


def test_masks_that_are_not_there_are_empty_ones() -> None:
    missing = compare_detections([masked(ALL)], [ALL], FEW)
    assert (missing.min_mask_iou, missing.median_mask_iou) == (0, 0)
    assert len(missing.violations(FEW)) == 2
    boxes = compare_detections([ALL], [masked(ALL)], FEW)
    assert boxes.min_mask_iou is None and "mask" not in boxes.model_dump_json()
    assert boxes.violations(FEW) == [] and "mask" not in boxes.summary()


def test_masks_follow_their_detections_through_equal_scores() -> None:
    a = masked(Detections(ALL.boxes, np.full(3, 0.5, np.float32), ALL.labels))
    b = a.take(np.array([2, 0, 1]))
    assert compare_detections([a], [b], FEW).min_mask_iou == 1


def test_masks_that_are_not_judged_make_a_wider_budget() -> None:
    silent = Budget(mask_iou=None)
    assert "mask_iou 0 (usually 0.9)" in silent.wider_than(Budget())[0]
    assert Budget().of_boxes().wider_than(Budget().of_boxes()) == []
    assert "mask" not in Budget().of_boxes().model_dump_json()
