"""What is wrong with a data set: one set of findings for checking, training and scoring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from detr.cli_support import counted, progress
from detr.data.dataset import Annotation, Dataset
from detr.data.images import Exif, Header, read_header
from detr.errors import UserError

# Of one kind, as many are shown: what is wrong fits one screen.
_SHOWN = 5


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
        findings: Of the set first, then in the order of the images.
    """

    data: str
    images: int = 0
    objects: int = 0
    most_objects: int = 0
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
    dataset: Dataset, indices: Sequence[int] | None = None, pictures: bool = True
) -> Findings:
    """Reads all labels and all image headers; decodes no pixels.

    Args:
        dataset: What is looked at.
        indices: Only these images.
        pictures: Whether a missing picture is an error; labels can be scored without.

    Returns:
        What training and scoring would meet. :meth:`Findings.stop` raises the first error.
    """
    chosen = range(len(dataset)) if indices is None else indices
    found = Findings(data=dataset.spec, images=len(chosen))
    found.findings += of_the_set(dataset)
    with ThreadPoolExecutor() as pool:
        looks = pool.map(lambda i: look(dataset, i, pictures), chosen)
        for annotations, findings in progress(looks, f"labels of {dataset.spec}", len(chosen)):
            objects = sum(not annotation.ignore for annotation in annotations)
            found.objects += objects
            found.most_objects = max(found.most_objects, objects)
            found.findings += findings
    found.findings += no_objects(dataset, found.objects)
    return found


def of_the_set(dataset: Dataset) -> list[Finding]:
    """What is wrong with the set as a whole."""
    return _as_errors(dataset.problems()) + _as_warnings(dataset.warnings())


def look(dataset: Dataset, i: int, pictures: bool = True) -> tuple[list[Annotation], list[Finding]]:
    """The annotations of one image that count, and everything wrong with it but its pixels."""
    scan = dataset.scan(i)
    findings = _as_errors(scan.errors) + _as_warnings(scan.warnings)
    path = dataset.image_path(i)
    if pictures or path.exists():
        try:
            findings += _as_errors(_size_errors(path, dataset.bounds(i), dataset.exif))
        except UserError as error:
            findings += _as_errors([error])
    return scan.annotations, findings


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
                f"({', '.join(dataset.classes.names)}): there is nothing to learn or to score",
            )
        ]
    )


def _as_errors(errors: Iterable[UserError]) -> list[Finding]:
    return [Finding(severity="error", code=e.code, message=e.message) for e in errors]


def _as_warnings(errors: Iterable[UserError]) -> list[Finding]:
    return [Finding(severity="warning", code=e.code, message=e.message) for e in errors]


def _size_errors(path: Path, claimed: tuple[int, int] | None, exif: Exif | None) -> list[UserError]:
    """Labels of another raster than the one that would be read."""
    header = read_header(path)
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
