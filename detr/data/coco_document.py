"""Any data set's ground truth as a COCO document, which COCO evaluators read."""

from __future__ import annotations

from typing import Any

from detr.data.dataset import Dataset


def coco_ground_truth(dataset: Dataset) -> dict[str, Any]:
    """The labels of a data set in COCO's instances format.

    Boxes and areas are those of the label files, unrounded and not clipped, so that a COCO set
    scores exactly as its own file would; boxes without area are left out, as in training. An ignore
    region becomes an ``iscrowd`` annotation of its
    class, or one of every class. Image ids are the data set's, category ids its class map's.

    Raises:
        UserError: Where a label file is bad.
    """
    classes = dataset.classes
    annotations: list[dict[str, Any]] = []
    for i in range(len(dataset)):
        for row in dataset.annotations(i):
            x0, y0, x1, y1 = row.box
            labels = [row.label] if row.label >= 0 else range(len(classes))
            for label in labels:
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # 0 would mean "no match" to COCO evaluators
                        "image_id": dataset.image_id(i),
                        "category_id": classes.category_ids[label],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": row.area,
                        "iscrowd": int(row.ignore),
                    }
                )
    return {
        "images": [{"id": dataset.image_id(i)} for i in range(len(dataset))],
        "annotations": annotations,
        "categories": [
            {"id": c, "name": n} for c, n in zip(classes.category_ids, classes.names, strict=True)
        ],
    }
