"""Average precision of anyone's detections; needs labels, no images and no model.

Detections are a COCO results file or a folder of KITTI result files (``FRAME.txt``, 16 columns).
Either can be scored by either protocol, as far as the data set knows what the protocol needs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from bench.analysis.analyze import analyze, properties
from bench.analysis.model import Analysis
from bench.detections import (
    as_coco,
    as_detections,
    as_kitti,
    read_coco_results,
    read_kitti_folder,
)
from bench.pictures import mistake_pictures
from bench.report.model import Example, percent
from detr.data import inspect
from detr.data.coco_document import coco_ground_truth
from detr.data.dataset import Dataset
from detr.data.kitti_rows import KittiLabels
from detr.errors import UserError
from detr.metrics import coco_ap, kitti_ap
from detr.metrics.coco_ap import Accuracy, CocoAp
from detr.metrics.kitti_ap import KittiAp
from detr.metrics.outcomes import match_detections

Protocol = Literal["coco", "kitti"]


class Score(BaseModel):
    """What ``bench score`` found.

    Attributes:
        detections: Path as given.
        data: Data set as given.
        protocol: Which of ``coco`` and ``kitti`` is filled.
        masks: COCO AP of masks, where detections and labels have them.
        boundary: Boundary AP of masks, where it was asked for.
        notes: What was left out of the labels.
        analysis: Curves, confusions and slices.
        mistakes: Pictures of the worst mistakes, where the images are there; only on the page.
    """

    detections: str
    data: str
    protocol: Protocol
    coco: CocoAp | None = None
    kitti: KittiAp | None = None
    masks: CocoAp | None = None
    boundary: CocoAp | None = None
    notes: list[str] = []
    analysis: Analysis | None = None
    mistakes: list[Example] = Field(default=[], exclude=True)

    def summary(self) -> str:
        """A table of AP."""
        if self.coco is not None:
            tables = [coco_text(self.coco)]
        else:
            assert self.kitti is not None
            tables = [kitti_text(self.kitti)]
        if self.masks is not None:
            tables.append(coco_text(self.masks, "masks"))
        if self.boundary is not None:
            tables.append(coco_text(self.boundary, "masks, boundary IoU"))
        return "\n".join(["\n\n".join(tables), *self.notes])

    def text(self) -> str:
        """Tables for the terminal."""
        return "\n".join([self.summary(), *(self.analysis.text() if self.analysis else [])])


def score(
    detections: Path,
    dataset: Dataset,
    protocol: Protocol | None = None,
    accuracy: Accuracy | None = None,
    slices: Path | None = None,
    pictures: bool = False,
    boundary: bool = False,
) -> Score:
    """Scores a results file or folder.

    Args:
        detections: A COCO results file, or a folder of KITTI result files.
        dataset: The ground truth.
        protocol: By default KITTI's for KITTI result files of a KITTI data set, else COCO's.
        accuracy: How COCO AP is computed.
        slices: CSV file with what objects or images are to be sliced by.
        pictures: Whether to look for the images and cut the worst mistakes out of them.
        boundary: Whether to compute Boundary AP of masks; it takes ten times as long as AP.

    Raises:
        UserError: ``detections-missing``, ``detections-unreadable``, ``detections-entry``,
            ``detections-class``, ``detections-image``, ``protocol-data``, ``no-ground-truth``,
            ``slices-file``; ``mask-missing`` where Boundary AP is asked for and there are no masks.
    """
    if not detections.exists():
        raise UserError("detections-missing", f"{detections}: no such file or folder")
    folder = detections.is_dir()
    chosen: Protocol = protocol or ("kitti" if folder and dataset.protocols.kitti else "coco")
    findings = inspect(dataset, pictures=False)
    findings.stop()
    result = Score(detections=str(detections), data=dataset.spec, protocol=chosen)
    if findings.warnings:
        result.notes.append(findings.summary())
    accuracy = accuracy or Accuracy()
    every = range(len(dataset))
    slicings = properties(dataset, every, slices)
    truth = coco_ground_truth(dataset)
    rows = read_kitti_folder(detections, dataset) if folder else None
    results = read_coco_results(detections, dataset) if rows is None else as_coco(rows, dataset)
    if chosen == "kitti":
        labels = _kitti_labels(dataset)
        classes = _kitti_classes(dataset, labels)
        found = as_kitti(results, dataset) if rows is None else rows
        result.kitti = kitti_ap.evaluate([labels.objects(i) for i in every], found, classes)
    else:
        result.coco = coco_ap.evaluate_json(truth, results, accuracy)
        result.notes += filter(None, [result.coco.note()])
        _score_masks(result, dataset, results, accuracy, boundary)
    if boundary and result.boundary is None:
        raise UserError("mask-missing", f"{detections}: --boundary: {_no_masks(result)}")
    seen = as_detections(results, dataset)
    outcomes = match_detections(truth, seen, accuracy.max_dets)
    result.analysis, mistakes = analyze(truth, seen, outcomes, slicings)
    if pictures:
        shown = mistake_pictures(Path(result.detections).name, mistakes, dataset, every, truth)
        result.mistakes = [] if shown is None else [shown]
    return result


def _score_masks(
    result: Score,
    dataset: Dataset,
    results: list[dict[str, Any]],
    accuracy: Accuracy,
    boundary: bool,
) -> None:
    """AP of masks, if the results have any; without masks in the labels a note says so."""
    if not any("segmentation" in entry for entry in results):
        return
    try:
        truth = coco_ground_truth(dataset, masks=True)
    except UserError as error:
        if not error.code.startswith("mask-"):
            raise
        result.notes.append(f"masks are not scored: {error.message}")
        return
    result.masks = coco_ap.evaluate_json(truth, results, replace(accuracy, overlap="segm"))
    if boundary:
        result.boundary = coco_ap.evaluate_json(
            truth, results, replace(accuracy, overlap="boundary")
        )


def _no_masks(result: Score) -> str:
    if result.protocol == "kitti":
        return "the KITTI protocol has no masks"
    unscored = [note for note in result.notes if note.startswith("masks are not scored")]
    return unscored[0] if unscored else "the detections have no masks"


def _kitti_labels(dataset: Dataset) -> KittiLabels:
    """The labels as the KITTI protocol needs them.

    Raises:
        UserError: ``protocol-data`` where the data set has none.
    """
    labels = dataset.protocols.kitti
    if labels is None:
        raise UserError(
            "protocol-data",
            f"{dataset.spec}: the KITTI protocol needs KITTI labels (occlusion, truncation, "
            "DontCare); use --protocol coco",
        )
    return labels


def _kitti_classes(dataset: Dataset, labels: KittiLabels) -> list[str]:
    """The benchmark's three classes as far as the data set has them.

    Raises:
        UserError: ``protocol-data`` where it has none.
    """
    classes = kitti_ap.evaluable(labels)
    if not classes:
        raise UserError(
            "protocol-data",
            f"{dataset.spec}: none of its classes ({', '.join(dataset.classes.names)}) is one the "
            f"KITTI protocol evaluates ({', '.join(kitti_ap.OFFICIAL_CLASSES)}, unmerged)",
        )
    return classes


def coco_text(ap: CocoAp, of: str = "boxes") -> str:
    """COCO AP as lines of text, AP times 100.

    Args:
        ap: What is told.
        of: Of what the overlap was taken.
    """
    width = max(map(len, ap.per_class), default=5)
    # Whose boxes are scored knows it, as long as nothing else is.
    lines = [] if of == "boxes" else [f"{of}:"]
    lines += [f"{'class':{width}}  {of.split(',')[0]:>6}  {'AP':>5}  {'AP50':>5}"]
    lines += [
        f"{name:{width}}  {c.count:6}  {percent(c.ap):>5}  {percent(c.ap50):>5}"
        for name, c in ap.per_class.items() if c.count
    ]  # fmt: skip
    lines += [
        f"{'all':{width}}  {ap.n_gt:6}  {percent(ap.ap):>5}  {percent(ap.ap50):>5}",
        f"AP75 {percent(ap.ap75)}, small {percent(ap.ap_small)}, medium {percent(ap.ap_medium)}, "
        f"large {percent(ap.ap_large)}; {ap.images} images",
        f"AR {percent(ap.ar)} (small {percent(ap.ar_small)}, medium "
        f"{percent(ap.ar_medium)}, large {percent(ap.ar_large)})",
    ]
    lines += [f"AP at IoU {iou}: {percent(value)}" for iou, value in (ap.at_iou or {}).items()]
    return "\n".join(lines)


def kitti_text(ap: KittiAp) -> str:
    """KITTI AP as lines of text, AP times 100."""
    lines = [f"{'class':12}  {'points':>6}  {'easy':>7}  {'moderate':>8}  {'hard':>7}"]
    for name, found in ap.per_class.items():
        levels = (found.easy, found.moderate, found.hard)
        for points, values in (
            (40, [_two(level.ap40) + level.mark for level in levels]),
            (11, [_two(level.ap11) + level.mark for level in levels]),
            ("boxes", [str(level.count) for level in levels]),
        ):
            lines.append(f"{name:12}  {points:>6}  {values[0]:>7}  {values[1]:>8}  {values[2]:>7}")
    return "\n".join([*lines, *filter(None, [ap.note()]), f"{ap.images} images"])


def _two(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
