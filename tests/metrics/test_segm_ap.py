"""COCO AP of masks: equal to pycocotools, and hand-worked cases."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pycocotools import mask as coco_mask

from detr.data import open_dataset
from detr.data.synth import generate
from detr.errors import UserError
from detr.masks import Rle, encode
from detr.metrics.coco_ap import Accuracy, CocoAp, evaluate, evaluate_json, to_results
from detr.types import Detections

SEGM = Accuracy(overlap="segm")
SIZE = (60, 80)


def pycocotools_stats(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    """Of results as COCO asks for them: without boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    plain = [{k: v for k, v in r.items() if k != "bbox"} for r in copy.deepcopy(results)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(plain), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)


def stats(ap: CocoAp) -> list[float]:
    values = (
        *(ap.ap, ap.ap50, ap.ap75, ap.ap_small, ap.ap_medium, ap.ap_large),
        *(ap.ar1, ap.ar10, ap.ar, ap.ar_small, ap.ar_medium, ap.ar_large),
    )
    return [-1.0 if v is None else v for v in values]


def test_equals_pycocotools_on_the_official_fixture(shared_data: Path) -> None:
    """Its objects' masks, moved by a few pixels or lost, are the detections."""
    path = shared_data / "coco_eval" / "instances_val2014_100.json"
    ground_truth = json.loads(path.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    rng = np.random.default_rng(0)
    results: list[dict[str, Any]] = []
    for row in ground_truth["annotations"]:
        height, width = sizes[row["image_id"]]
        told = row["segmentation"]
        if isinstance(told, list):
            pixels = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(told, height, width)))
        else:
            pixels = coco_mask.decode(coco_mask.frPyObjects(told, height, width))
        for _ in range(int(rng.integers(0, 3))):
            moved = np.roll(pixels, rng.integers(-6, 7, 2), (0, 1)).astype(bool)
            results.append(
                {
                    **{"image_id": row["image_id"], "category_id": row["category_id"]},
                    "segmentation": encode(moved).to_json(),
                    "score": float(rng.uniform()),
                }
            )
    ap = evaluate_json(ground_truth, results, SEGM)
    assert 0.05 < ap.ap < 0.9 and sum(row["iscrowd"] for row in ground_truth["annotations"])
    assert stats(ap) == pytest.approx(pycocotools_stats(ground_truth, results), abs=1e-9)


def blob(rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """A rectangle with holes, or nothing."""
    pixels = np.zeros(SIZE, dtype=np.bool_)
    if rng.random() < 0.1:
        return pixels
    top, left = (int(v) for v in rng.integers(0, [50, 70]))
    high, wide = (int(v) for v in rng.integers(2, 45, 2))
    pixels[top : top + high, left : left + wide] = rng.random() < 2
    return pixels & (rng.random(SIZE) < 0.9)


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_on_random_run_lengths(seed: int) -> None:
    """With crowds, empty masks, equal scores, and boxes that no one may look at."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number in range(1, 50):
        pixels = blob(rng)
        mask = encode(pixels)
        x0, y0, x1, y1 = mask.box
        place = {"image_id": int(rng.integers(1, 4)), "category_id": int(rng.choice([3, 7]))}
        annotations.append(
            {
                **place,
                "id": number,
                "segmentation": mask.to_json(),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": mask.area,
                "iscrowd": int(number % 8 == 0),
            }
        )
        for _ in range(int(rng.integers(0, 4))):
            near = np.roll(pixels, rng.integers(-2, 3, 2), (0, 1))
            shown = near if rng.random() < 0.8 else blob(rng)
            score = round(float(rng.uniform()), 1)
            found = {"segmentation": encode(shown).to_json(), "bbox": [0, 0, 5, 5], "score": score}
            results.append({**place, **found})
    ground_truth = {
        "images": [{"id": k, "height": SIZE[0], "width": SIZE[1]} for k in (1, 2, 3)],
        "categories": [{"id": 3, "name": "car"}, {"id": 7, "name": "tram"}],
        "annotations": annotations,
    }
    before = copy.deepcopy((ground_truth, results))
    ap = evaluate_json(ground_truth, results, SEGM)
    assert stats(ap) == pytest.approx(pycocotools_stats(ground_truth, results), abs=1e-9)
    assert (ground_truth, results) == before


def detections(masks: list[Rle], labels: list[int]) -> Detections:
    boxes = np.array([mask.box for mask in masks], dtype=np.float32).reshape(-1, 4)
    scores = np.linspace(0.9, 0.5, len(masks), dtype=np.float32)
    return Detections(boxes, scores, np.array(labels, dtype=np.int64), tuple(masks))


def test_a_data_set_with_masks(tmp_path: Path) -> None:
    """Own masks score 1 by every overlap; masks that are boxes do not."""
    generate(tmp_path / "s", 6, (96, 320), 3, "coco")
    data = open_dataset(f"coco:{tmp_path / 's'}:train")
    perfect, filled = [], []
    for i in range(len(data)):
        labels = data.labels_with_masks(i)
        masks = [mask.rle((96, 320)) for mask in labels.masks or ()]
        perfect.append(detections(masks, labels.labels.tolist()))
        boxes = np.zeros((len(masks), 96, 320), dtype=np.bool_)
        for row, mask in zip(boxes, masks, strict=True):
            x0, y0, x1, y1 = (int(v) for v in mask.box)
            row[y0:y1, x0:x1] = True
        filled.append(detections([encode(row) for row in boxes], labels.labels.tolist()))
    for overlap in ("segm", "boundary"):
        accuracy = Accuracy(overlap=overlap)
        assert evaluate(data, perfect, accuracy=accuracy).ap == 1
        assert evaluate(data, filled, accuracy=accuracy).ap < 0.6
    assert evaluate(data, filled, [*range(len(data))], SEGM).n_gt == sum(map(len, filled))
    entries = to_results(1, perfect[0], data.classes)
    assert all({"bbox", "segmentation"} <= entry.keys() for entry in entries)
    boxes_alone = [Detections(f.boxes, f.scores, f.labels) for f in perfect]
    with pytest.raises(ValueError, match="no segmentation"):
        evaluate(data, boxes_alone, accuracy=SEGM)
    kitti = tmp_path / "k"
    generate(kitti, 6, (96, 320), 3)
    with pytest.raises(UserError, match="no mask") as caught:
        evaluate(open_dataset(f"kitti:{kitti}:train"), perfect, accuracy=SEGM)
    assert caught.value.code == "mask-missing"


def test_detections_keep_their_masks() -> None:
    masks = [encode(np.eye(4, dtype=np.bool_)), encode(np.ones((4, 4), dtype=np.bool_))]
    found = detections(masks, [0, 1])
    assert found.above(0.6).masks == (masks[0],)
    assert found.take(np.array([1, 0])).masks == (masks[1], masks[0])
