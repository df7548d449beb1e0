"""The data doctor: everything wrong with a data set, and what is in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import BaseModel

from detr.cli_support import counted, progress
from detr.data.dataset import Annotation, Dataset, Scan
from detr.data.images import read_image
from detr.errors import UserError

# COCO's own limits of "small" and "medium", in square pixels.
SMALL, MEDIUM = 32**2, 96**2

# KITTI's and COCO's boxes touch or pass the border by a fraction of a pixel.
TOLERANCE = 1.5


class Problem(BaseModel):
    """One thing wrong, with its place.

    Attributes:
        severity: An ``error`` stops training or scoring; a ``warning`` is skipped or clipped.
        code: The stable code of the error that reading raises, or of the warning.
        message: File, line or annotation, and what is wrong.
    """

    severity: Literal["error", "warning"]
    code: str
    message: str


class ClassCount(BaseModel):
    """How often a class occurs.

    Attributes:
        name: Class name.
        objects: Labeled objects, ignore regions left out.
        images: Images with at least one.
    """

    name: str
    objects: int
    images: int


class CheckReport(BaseModel):
    """What the check found.

    Attributes:
        data: The data set as typed.
        images, objects, ignored, unlabeled: Images, labeled objects, ignore regions, and images
            without an object.
        problems: All of them, in the order of the images.
        classes: Class balance, in class order.
        sizes: Objects of COCO's small, medium and large area.
        heights: Objects by box height in pixels; key ``16`` counts 16 <= height < 32.
    """

    data: str
    images: int
    objects: int
    ignored: int
    unlabeled: int
    problems: list[Problem]
    classes: list[ClassCount]
    sizes: dict[str, int]
    heights: dict[int, int]

    @property
    def errors(self) -> int:
        """Number of problems that stop training or scoring."""
        return sum(problem.severity == "error" for problem in self.problems)

    def text(self) -> str:
        """The report for a terminal."""
        warnings = len(self.problems) - self.errors
        lines = [f"{p.severity:<7} [{p.code}] {p.message}" for p in self.problems]
        lines += [""] if lines else []
        lines += [
            f"{self.data}: {self.images} images, {self.objects} objects, "
            f"{self.ignored} ignore regions, {self.unlabeled} images without objects",
            "",
            "class balance (objects, images)",
            *_bars([(c.name, c.objects, f"{c.objects} in {c.images}") for c in self.classes]),
            "",
            "box area (COCO: small < 32x32 <= medium < 96x96 <= large)",
            *_bars([(name, n, str(n)) for name, n in self.sizes.items()]),
            "",
            "box height in pixels",
            *_bars([(f"{low}-{low * 2}", n, str(n)) for low, n in self.heights.items()]),
            "",
            f"{counted(self.errors, 'error')}, {counted(warnings, 'warning')}",
        ]
        return "\n".join(lines)


def _bars(rows: list[tuple[str, int, str]]) -> list[str]:
    """One line a row: name, a bar with eighths of a cell, and a note."""
    wide = max((len(name) for name, _, _ in rows), default=0)
    most = max((count for _, count, _ in rows), default=0) or 1
    lines = []
    for name, count, note in rows:
        eighths = math.ceil(count / most * 40 * 8)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        lines.append(f"  {name:>{wide}} {bar} {note}".rstrip())
    return lines


def check(dataset: Dataset) -> CheckReport:
    """Decodes every image and reads every label row; collects all problems."""
    problems = [_problem(error) for error in dataset.problems()]
    rows: list[list[Annotation]] = []
    with ThreadPoolExecutor() as pool:
        seen = pool.map(lambda i: _look(dataset, i), range(len(dataset)))
        for found, own_problems in progress(seen, "checking images", total=len(dataset)):
            rows.append(found.annotations)
            problems += own_problems
    return _report(dataset, rows, problems)


def _look(dataset: Dataset, i: int) -> tuple[Scan, list[Problem]]:
    scan = dataset.scan(i)
    problems = [_problem(error) for error in scan.errors]
    size: tuple[int, int] | None = None
    path = dataset.image_path(i)
    try:
        height, width = read_image(path).shape[:2]
        size = (height, width)
        claimed = dataset.bounds(i)
        if claimed is not None and claimed != size:
            problems.append(
                Problem(
                    severity="error",
                    code="image-size",
                    message=f"{path}: is {width}x{height}, its annotations say "
                    f"{claimed[1]}x{claimed[0]} (width x height)",
                )
            )
    except UserError as error:
        problems.append(_problem(error))
    problems += _box_problems(scan.annotations, size)
    return scan, problems


def _box_problems(rows: list[Annotation], size: tuple[int, int] | None) -> Iterator[Problem]:
    for row in rows:
        x0, y0, x1, y1 = row.box
        shown = f"[{x0:g}, {y0:g}, {x1:g}, {y1:g}]"
        if row.empty:
            yield Problem(
                severity="warning",
                code="box-empty",
                message=f"{row.where}: box {shown} has no area; it is skipped",
            )
        elif size is None:
            continue
        elif x1 <= 0 or y1 <= 0 or x0 >= size[1] or y0 >= size[0]:
            yield Problem(
                severity="error",
                code="box-outside",
                message=f"{row.where}: box {shown} lies outside the image ({size[1]}x{size[0]})",
            )
        elif min(x0, y0) < -TOLERANCE or x1 > size[1] + TOLERANCE or y1 > size[0] + TOLERANCE:
            yield Problem(
                severity="warning",
                code="box-over-border",
                message=f"{row.where}: box {shown} passes the border of the image "
                f"({size[1]}x{size[0]})",
            )


def _problem(error: UserError) -> Problem:
    return Problem(severity="error", code=error.code, message=error.message)


def _nothing(dataset: Dataset) -> Problem:
    # Most often a misspelt source of a class, the rest ignored.
    return Problem(
        severity="error",
        code="no-ground-truth",
        message=f"{dataset.spec}: no label is an object of a class "
        f"({', '.join(dataset.classes.names)}): there is nothing to learn or to score",
    )


def _report(dataset: Dataset, rows: list[list[Annotation]], problems: list[Problem]) -> CheckReport:
    objects: Counter[int] = Counter()
    images: Counter[int] = Counter()
    sizes = {"small": 0, "medium": 0, "large": 0}
    heights: Counter[int] = Counter()
    ignored = unlabeled = 0
    for found in rows:
        kept = [row for row in found if not row.ignore and not row.empty]
        ignored += sum(row.ignore for row in found)
        unlabeled += not kept
        objects.update(row.label for row in kept)
        images.update({row.label for row in kept})
        for row in kept:
            height = row.box[3] - row.box[1]
            sizes["small" if row.area < SMALL else "medium" if row.area < MEDIUM else "large"] += 1
            heights[2 ** max(0, math.floor(math.log2(height)))] += 1
    if not objects:
        problems = [*problems, _nothing(dataset)]
    low, high = (min(heights), max(heights)) if heights else (1, 0)
    steps = [2**k for k in range(int(math.log2(low)), int(math.log2(high)) + 1)] if high else []
    return CheckReport(
        data=dataset.spec,
        images=len(dataset),
        objects=sum(objects.values()),
        ignored=ignored,
        unlabeled=unlabeled,
        problems=problems,
        classes=[
            ClassCount(name=name, objects=objects[k], images=images[k])
            for k, name in enumerate(dataset.classes.names)
        ],
        sizes=sizes,
        heights={step: heights[step] for step in steps},
    )
