"""Any data set's ground truth as a COCO document, which COCO evaluators read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from detr.data.dataset import Annotation, Dataset
from detr.masks import of_box


def annotation_rows(
    dataset: Dataset, indices: Sequence[int] | None = None, masks: bool = False
) -> Iterator[tuple[int, int, Annotation]]:
    """Image, class index and annotation of every row of the document, in its order.

    Args:
        dataset: Whose labels.
        indices: Only of these images; of all by default.
        masks: Whether objects without a mask that can be read do not count.

    Raises:
        UserError: Where a label file is bad.
    """
    for i in range(len(dataset)) if indices is None else indices:
        for row in dataset.annotations(i, masks):
            for label in [row.label] if row.label >= 0 else range(len(dataset.classes)):
                yield i, label, row


def coco_ground_truth(dataset: Dataset, masks: bool = False) -> dict[str, Any]:
    """The labels of a data set in COCO's instances format.

    Boxes and areas are those of the label files, unrounded and not clipped, so that a COCO set
    scores exactly as its own file would; boxes without area are left out, as in training. An ignore
    region becomes an ``iscrowd`` annotation of its
    class, or one of every class. Image ids are the data set's, category ids its class map's.

    Args:
        dataset: Whose labels.
        masks: Whether rows have ``segmentation``, and images their size. An ignore region without
            a mask is its box.

    Raises:
        UserError: Where a label file is bad, or an object has no mask and they are asked for.
    """
    classes = dataset.classes
    annotations: list[dict[str, Any]] = []
    for i, label, row in annotation_rows(dataset, masks=masks):
        x0, y0, x1, y1 = row.box
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
        if masks:
            mask = of_box(row.box) if row.mask is None else row.mask()
            annotations[-1]["segmentation"] = mask.to_json()
    images: list[dict[str, Any]] = [{"id": dataset.image_id(i)} for i in range(len(dataset))]
    if masks:
        for i, image in enumerate(images):
            image["height"], image["width"] = dataset.image_size(i)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": c, "name": n} for c, n in zip(classes.category_ids, classes.names, strict=True)
        ],
    }
