"""What is wrong with a data set: one set of findings for checking, training and scoring."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from detr.cli_support import counted, progress
from detr.data.dataset import Annotation, Dataset, Scan, evenly_spaced
from detr.data.images import Exif, Header, read_image
from detr.data.value_range import measure
from detr.errors import UserError

# Of one kind, as many are shown: what is wrong fits one screen.
_SHOWN = 5
# Deep pictures that are decoded to see what values they have, and gray levels that are enough.
_DEEP_SAMPLE, _LEVELS = 8, 64


class Finding(BaseModel):
    """One thing wrong, with its place.

    Attributes:
        severity: An ``error`` stops training and scoring; a ``warning`` is left out or clipped.
        code: Stable, as listed in ``docs/errors.md``.
        message: File, line or annotation, and what is wrong.
    """

    severity: Literal["error", "warning"]
    code: str
    message: str


class Findings(BaseModel):
    """Everything wrong with a data set.

    Attributes:
        data: The data set as typed.
        images: How many were looked at.
        objects: Objects of a class in them.
        most_objects: In one image.
        fingerprint: Hash of classes, images' names and sizes, and the labels that count; that of
            the same data anywhere else is the same.
        findings: Of the set first, then in the order of the images.
    """

    data: str
    images: int = 0
    objects: int = 0
    most_objects: int = 0
    fingerprint: str = ""
    findings: list[Finding] = []

    @property
    def errors(self) -> list[Finding]:
        """What stops training and scoring."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """What is left out or clipped."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    def stop(self) -> None:
        """Raises the first error, if there is one, and says how many more there are.

        Raises:
            UserError: With the finding's own code.
        """
        errors = self.errors
        if errors:
            more = (
                f"; {counted(len(errors) - 1, 'more error')}: detr data check {self.data}"
                if len(errors) > 1
                else ""
            )
            raise UserError(errors[0].code, errors[0].message + more)

    def summary(self) -> str:
        """The warnings in one line, counted by code; empty without any."""
        kinds = Counter(finding.code for finding in self.warnings)
        if not kinds:
            return ""
        listed = ", ".join(f"{code} {count}" for code, count in kinds.most_common())
        return (
            f"{self.data}: {counted(kinds.total(), 'warning')} ({listed}); "
            f"detr data check {self.data} lists them"
        )

    def lines(self) -> list[str]:
        """The findings for a terminal: errors first, a few of each kind."""
        lines: list[str] = []
        for severity, found in (("error", self.errors), ("warning", self.warnings)):
            for code in dict.fromkeys(finding.code for finding in found):
                messages = [finding.message for finding in found if finding.code == code]
                lines += [f"{severity:<7} [{code}] {m}" for m in messages[:_SHOWN]]
                if (more := len(messages) - _SHOWN) > 0:
                    lines.append(f"{severity:<7} [{code}] ... and {more} more; --json lists all")
        return lines


def inspect(
    dataset: Dataset,
    indices: Sequence[int] | None = None,
    pictures: bool = True,
    masks: bool = False,
) -> Findings:
    """Reads all labels and all image headers; decodes no pixels.

    Args:
        dataset: What is looked at.
        indices: Only these images.
        pictures: Whether a missing picture is an error; labels can be scored without.
        masks: Whether masks are wanted, so that an object without is an error.

    Returns:
        What training and scoring would meet. :meth:`Findings.stop` raises the first error.
    """
    chosen = range(len(dataset)) if indices is None else indices
    found = Findings(data=dataset.spec, images=len(chosen))
    looks = []
    with ThreadPoolExecutor() as pool:
        seen = pool.map(lambda i: look(dataset, i, pictures, masks), chosen)
        for one in progress(seen, f"labels of {dataset.spec}", len(chosen)):
            objects = sum(not annotation.ignore for annotation in one.annotations)
            found.objects += objects
            found.most_objects = max(found.most_objects, objects)
            found.findings += one.findings
            # Of large sets the annotations are too much to keep.
            looks.append(replace(one, annotations=[], findings=[]))
    found.fingerprint = fingerprint(dataset, looks)
    found.findings = [
        *of_the_set(dataset),
        *depth_findings(dataset, looks),
        *found.findings,
        *no_objects(dataset, found.objects),
    ]
    return found


def of_the_set(dataset: Dataset) -> list[Finding]:
    """What is wrong with the set as a whole."""
    return _as_errors(dataset.problems()) + _as_warnings(dataset.warnings())


@dataclass(frozen=True)
class Look:
    """What a label file and an image's header say.

    Attributes:
        index: Of the image.
        annotations: Those that count.
        findings: Everything wrong with it but its pixels.
        header: None where there is no picture.
        digest: Hash of the image's name and size and of the annotations.
    """

    index: int
    annotations: list[Annotation]
    findings: list[Finding]
    header: Header | None = None
    digest: bytes = b""


def look(dataset: Dataset, i: int, pictures: bool = True, masks: bool = False) -> Look:
    """Reads the labels and the header of one image."""
    scan = dataset.scan_with_masks(i) if masks else dataset.scan(i)
    findings = _as_errors(scan.errors) + _as_warnings(scan.warnings)
    path, header = dataset.image_path(i), None
    if pictures or path.exists():
        try:
            header = dataset.header(i)
            findings += _as_errors(_size_errors(path, header, dataset.bounds(i), dataset.exif))
        except UserError as error:
            findings += _as_errors([error])
    return Look(i, scan.annotations, findings, header, _digest(dataset, i, scan, header, masks))


def fingerprint(dataset: Dataset, looks: Sequence[Look]) -> str:
    """A hash of what a data set is, wherever it lies; pixels count by the size of their file."""
    try:
        value_range = dataset.value_range
    except UserError:  # a finding of its own
        value_range = None
    digest = hashlib.sha256(repr((dataset.classes, value_range, dataset.exif)).encode())
    for one in looks:
        digest.update(one.digest)
    return digest.hexdigest()


def masks_of(dataset: Dataset, one: Look) -> list[Finding]:
    """What is wrong with masks that are there; who wants boxes alone is not stopped by it."""
    if all(annotation.mask is None for annotation in one.annotations):
        return []
    scan = dataset.scan_with_masks(one.index)
    found = [*scan.errors, *scan.warnings]
    return _as_warnings(
        error for error in found if error.code.startswith("mask-") and error.code != "mask-missing"
    )


def _digest(dataset: Dataset, i: int, scan: Scan, header: Header | None, masks: bool) -> bytes:
    rows: list[tuple[object, ...]] = [(a.box, a.label, a.ignore) for a in scan.annotations]
    if masks:
        rows += [(a.mask().to_json(),) for a in scan.annotations if a.mask is not None]
    path = dataset.image_path(i)
    size = None if header is None else (header.stored, path.stat().st_size)
    return hashlib.sha256(repr((dataset.image_id(i), path.name, size, rows)).encode()).digest()


def depth_findings(dataset: Dataset, looks: Sequence[Look]) -> list[Finding]:
    """What is lost where pictures of more than 8 bits become such of 8."""
    headers = {one.index: one.header for one in looks if one.header is not None}
    cut = [i for i, header in headers.items() if header.cut]
    deep = [i for i, header in headers.items() if header.deep]
    of_all = f"of {counted(len(headers), 'image')}"
    findings = []
    if cut:
        told = f"{len(cut)} {of_all} have color of 16 bits, of which the upper 8 are read"
        findings += _as_warnings(
            [UserError("image-depth", f"{dataset.image_path(cut[0])}: {told}")]
        )
    try:
        value_range = dataset.value_range
    except UserError as error:
        return findings + _as_errors([error])
    flat = [i for i, header in headers.items() if not header.deep]
    if flat and value_range is not None:
        told = f"{len(flat)} {of_all} have 8 bits, but the range {list(value_range)} is given"
        findings += _as_errors([UserError("image-range", f"{dataset.image_path(flat[0])}: {told}")])
    if not deep or value_range is not None:
        return findings
    paths = [dataset.image_path(deep[k]) for k in evenly_spaced(len(deep), _DEEP_SAMPLE)]
    try:
        images = [read_image(path) for path in paths]
        low, high = measure(images, (0.1, 99.9))
    except UserError:  # a broken picture is a finding of its own
        return findings
    told = f"{paths[0]}: {len(deep)} {of_all} have values from {low:g} to {high:g}"
    advice = f"say range: [{low:g}, {high:g}] in a data YAML"
    if any(image.dtype == np.float32 for image in images):
        return findings + _as_errors([UserError("image-range", f"{told}; {advice}")])
    levels = round((high - low) / 257) + 1
    if levels < _LEVELS:
        told += f", which become {counted(levels, 'gray level')} of 256; {advice}"
        findings += _as_warnings([UserError("image-depth", told)])
    return findings


def no_objects(dataset: Dataset, objects: int) -> list[Finding]:
    """An error where no image has an object."""
    if objects:
        return []
    # Most often a misspelt source of a class, the rest ignored.
    return _as_errors(
        [
            UserError(
                "no-ground-truth",
                f"{dataset.spec}: no label is an object of a class "
                f"({', '.join(dataset.classes.names)}): there is nothing to learn or to score "
                "(bench run --unlabeled times images all the same)",
            )
        ]
    )


def _as_errors(errors: Iterable[UserError]) -> list[Finding]:
    return [Finding(severity="error", code=e.code, message=e.message) for e in errors]


def _as_warnings(errors: Iterable[UserError]) -> list[Finding]:
    return [Finding(severity="warning", code=e.code, message=e.message) for e in errors]


def _size_errors(
    path: Path, header: Header, claimed: tuple[int, int] | None, exif: Exif | None
) -> list[UserError]:
    """Labels of another raster than the one that would be read."""
    if header.turned and exif is None:
        told = claimed is not None and header.upright != header.stored
        if claimed == header.stored if told else claimed in (None, header.stored):
            return [UserError("image-exif", f"{path}: {_turned(header, told)}")]
    size = header.size(exif or "apply")
    if claimed in (None, size):
        return []
    assert claimed is not None
    return [
        UserError(
            "image-size",
            f"{path}: is {size[1]}x{size[0]}, its labels are for {claimed[1]}x{claimed[0]} "
            "(width x height)",
        )
    ]


def _turned(header: Header, told: bool) -> str:
    (height, width), (tall, wide) = header.stored, header.upright
    start = f"EXIF orientation {header.orientation} turns it from {width}x{height} to {wide}x{tall}"
    if told:
        return f"{start}, its labels are for {width}x{height}: say exif: ignore in a data YAML"
    return (
        f"{start}, and its labels do not tell which they mean: say exif: apply (as viewers "
        "show it) or exif: ignore (as stored) in a data YAML"
    )
