"""KITTI AP: the offline evaluation's figures on the val split, and hand-worked cases."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from detr.data.kitti_rows import KittiObject, read_label_file
from detr.metrics.kitti_ap import KittiClassAp, evaluate, sample_thresholds

Objects = list[list[KittiObject]]


def truth(
    x: float, kind: str = "Car", height: float = 50, occluded: int = 0, truncated: float = 0
) -> KittiObject:
    return KittiObject(kind, truncated, occluded, 0, (x, 100, x + 100, 100 + height))


def found(x: float, score: float, kind: str = "Car", height: float = 50) -> KittiObject:
    return KittiObject(kind, -1, -1, -10, (x, 100, x + 100, 100 + height), score)


def many(extra_truth: list[KittiObject], extra_found: list[KittiObject]) -> KittiClassAp:
    """41 images with one car, all found; the extras lie in the first image."""
    objects: Objects = [[truth(0)] for _ in range(41)]
    detections: Objects = [[found(0, 0.5 - 0.01 * n)] for n in range(41)]
    objects[0] += extra_truth
    detections[0] += extra_found
    return evaluate(objects, detections, ["Car"]).per_class["Car"]


@pytest.mark.slow
def test_reproduces_the_offline_evaluation(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "kitti_labels/label_2_reconstructed.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    frames = (shared_data / "kitti_labels/val.txt").read_text().split()
    objects = [read_label_file(tmp_path / f"label_2/{frame}.txt") for frame in frames]
    expected = json.loads((shared_data / "kitti_eval/expected.json").read_text())
    detections: dict[str, list[KittiObject]] = {frame: [] for frame in frames}
    for line in (shared_data / "kitti_eval/rgb_detection_val.txt").read_text().splitlines():
        path, kind, score, *corners = line.split()
        x0, y0, x1, y1 = map(float, corners)
        detections[Path(path).stem].append(
            KittiObject(expected["class_ids"][kind], -1, -1, -10, (x0, y0, x1, y1), float(score))
        )
    car = evaluate(objects, [detections[f] for f in frames], ["Car"]).per_class["Car"]
    levels = (car.easy, car.moderate, car.hard)
    assert [level.count for level in levels] == expected["Car_n_gt"]
    for key, values in (
        ("Car_AP11_recomputed", [level.ap11 for level in levels]),
        ("Car_AP40_recomputed", [level.ap40 for level in levels]),
    ):
        percent = [100 * v for v in values if v is not None]
        assert percent == pytest.approx(expected[key], abs=1e-3)  # ten times finer than asked


def test_perfect_detections_score_one() -> None:
    ap = many([], [])
    assert (ap.easy.ap11, ap.moderate.ap40, ap.hard.ap40) == (1.0, 1.0, 1.0)
    assert ap.easy.count == 41
    assert ap.easy.mark == ""


def test_one_false_positive_on_top_costs_one_in_42() -> None:
    ap = many([], [found(500, 0.9)])
    assert ap.moderate.ap40 == pytest.approx(41 / 42)


def test_a_second_detection_of_the_same_car_is_false() -> None:
    assert many([], [found(2, 0.9)]).moderate.ap40 == pytest.approx(41 / 42)


@pytest.mark.parametrize(
    ("region", "detection"),
    [
        (truth(500, "DontCare"), found(500, 0.9)),
        (truth(500, "Van"), found(500, 0.9)),
        (truth(500, occluded=3), found(500, 0.9)),
        (truth(500, truncated=0.6), found(500, 0.9)),
    ],
    ids=["dont-care", "van", "occlusion-unknown", "mostly-outside"],
)
def test_ignored_truth_makes_a_detection_neither_right_nor_wrong(
    region: KittiObject, detection: KittiObject
) -> None:
    ap = many([region], [detection])
    assert ap.hard.ap40 == 1.0
    assert ap.hard.count == 41


def test_dont_care_takes_by_share_of_the_detection_and_any_number() -> None:
    region = KittiObject("DontCare", -1, -1, -10, (400, 50, 900, 300))
    assert many([region], [found(450, 0.9), found(700, 0.9)]).hard.ap40 == 1.0
    # 60 of 100 pixels inside are less than the 0.7 a Car asks for.
    partly = KittiObject("DontCare", -1, -1, -10, (400, 50, 510, 300))
    assert many([partly], [found(450, 0.9)]).hard.ap40 == pytest.approx(41 / 42)


def test_a_truck_is_background_for_a_car() -> None:
    assert many([truth(500, "Truck")], [found(500, 0.9)]).hard.ap40 == pytest.approx(41 / 42)


def test_minimum_height_is_strict_and_cut_to_whole_pixels() -> None:
    low = many([], [found(500, 0.9, height=24.9)])
    assert (low.easy.ap40, low.moderate.ap40) == (1.0, 1.0)
    middle = many([], [found(500, 0.9, height=39.9)])
    assert middle.easy.ap40 == 1.0
    assert middle.moderate.ap40 == pytest.approx(41 / 42)
    assert many([], [found(500, 0.9, height=40)]).easy.ap40 == pytest.approx(41 / 42)
    # Ground truth is not cut: 24.9 is below 25, 25 is not.
    assert many([truth(500, height=24.9)], []).moderate.count == 41
    assert many([truth(500, height=25)], []).moderate.count == 42


def test_difficulties_take_their_share_of_the_truth() -> None:
    extra = [truth(300, occluded=1), truth(500, occluded=2), truth(700, truncated=0.3)]
    ap = many(extra, [])
    assert (ap.easy.count, ap.moderate.count, ap.hard.count) == (41, 43, 44)


def test_overlap_must_exceed_the_limit() -> None:
    def narrow(width: float) -> KittiObject:
        return KittiObject("Car", -1, -1, -10, (500, 100, 500 + width, 150), 0.9)

    # 70 of 100 pixels wide is an IoU of exactly 0.7: as good as somewhere else.
    assert many([truth(500)], [narrow(70)]).hard == many([truth(500)], [found(800, 0.9)]).hard
    assert many([truth(500)], [narrow(70.1)]).hard.ap40 == 1.0


def test_pedestrians_need_half_and_may_sit() -> None:
    objects: Objects = [[truth(0, "Pedestrian"), truth(500, "Person_sitting")]] * 41
    detections: Objects = [
        [found(30, 0.5 - n / 100, "Pedestrian"), found(500, 0.9, "Pedestrian")] for n in range(41)
    ]
    ap = evaluate(objects, detections, ["Pedestrian"]).per_class["Pedestrian"]
    assert ap.overlap == 0.5
    assert (ap.hard.ap40, ap.hard.count) == (1.0, 41)


def test_too_few_boxes_are_marked() -> None:
    result = evaluate([[truth(0)]], [[found(0, 0.9)]], ["Car"])
    assert result.per_class["Car"].easy.ap11 == pytest.approx(1 / 11)
    assert result.per_class["Car"].easy.mark == "†"
    assert "fewer than 41" in result.note()


def test_empty_sides() -> None:
    nothing_found = evaluate([[truth(0)]], [[]], ["Car"]).per_class["Car"]
    assert (nothing_found.easy.ap40, nothing_found.easy.count) == (0.0, 1)
    no_truth = evaluate([[]], [[found(0, 0.9)]], ["Car"]).per_class["Car"]
    assert (no_truth.easy.ap11, no_truth.easy.ap40, no_truth.easy.mark) == (None, None, "")
    with pytest.raises(ValueError, match="1 images of detections for 0"):
        evaluate([], [[]], ["Car"])


def test_thresholds_sample_recall_in_steps_of_a_fortieth() -> None:
    scores = np.linspace(1, 0, 400, endpoint=False)
    thresholds = sample_thresholds(np.random.default_rng(0).permutation(scores), 400)
    assert len(thresholds) == 41
    assert thresholds[0] == 1.0
    recall = np.searchsorted(-scores, -thresholds, side="right") / 400
    assert np.abs(recall[1:] - np.arange(1, 41) / 40).max() <= 1 / 400
    # Half of the boxes found: no threshold beyond that recall (a last one may close the list).
    assert len(sample_thresholds(scores[:200], 400)) in (20, 21, 22)
    assert len(sample_thresholds(np.array([]), 5)) == 0
