"""The data doctor: everything wrong with a data set, and what is in it."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel

from detr.cli_support import counted, progress
from detr.data.dataset import Annotation, Dataset
from detr.data.findings import (
    Finding,
    Findings,
    Look,
    depth_findings,
    fingerprint,
    look,
    masks_of,
    no_objects,
    of_the_set,
)
from detr.data.open import parse_spec
from detr.errors import UserError

# COCO's own limits of "small" and "medium", in square pixels.
SMALL, MEDIUM = 32**2, 96**2
_YAML = (".yaml", ".yml")


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


class CheckReport(Findings):
    """What the check found.

    Attributes:
        ignored: Ignore regions.
        masks: Objects with a mask.
        unlabeled: Images without an object.
        classes: Class balance, in class order.
        sizes: Objects of COCO's small, medium and large area.
        heights: Objects by box height in pixels; key ``16`` counts 16 <= height < 32.
    """

    ignored: int
    masks: int
    unlabeled: int
    classes: list[ClassCount]
    sizes: dict[str, int]
    heights: dict[int, int]

    def text(self) -> str:
        """The report for a terminal."""
        lines = self.lines()
        lines += [""] if lines else []
        lines += [
            f"{self.data}: {self.images} images, {self.objects} objects (at most "
            f"{self.most_objects} in an image), {self.ignored} ignore regions, "
            f"{self.unlabeled} images without objects"
            + (f"; {counted(self.masks, 'object')} with a mask" if self.masks else ""),
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
            f"{counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}",
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


def check(dataset: Dataset, masks: bool = False) -> CheckReport:
    """Decodes every image and reads every label row; collects all that is wrong.

    Args:
        dataset: What is looked at.
        masks: Whether it is to teach or to judge masks, so that an object without a mask, or with
            one that cannot be read, is an error. Else that of masks which are there is a warning.
    """
    with ThreadPoolExecutor() as pool:
        seen = pool.map(lambda i: _look(dataset, i, masks), range(len(dataset)))
        looks = list(progress(seen, "checking images", total=len(dataset)))
    findings = of_the_set(dataset) + depth_findings(dataset, looks)
    findings += [finding for one in looks for finding in one.findings]
    report = _report(dataset, [one.annotations for one in looks], findings)
    return report.model_copy(update={"fingerprint": fingerprint(dataset, looks)})


def _look(dataset: Dataset, i: int, masks: bool) -> Look:
    one = look(dataset, i, masks=masks)
    if not masks:
        one.findings.extend(masks_of(dataset, one))
    try:
        dataset.image(i)
    except UserError as error:
        # A range that does not fit is told once, for all images.
        if error.code not in {"image-range", *(finding.code for finding in one.findings)}:
            one.findings.append(Finding(severity="error", code=error.code, message=error.message))
    return one


def _report(
    dataset: Dataset, images: list[list[Annotation]], findings: list[Finding]
) -> CheckReport:
    objects: Counter[int] = Counter()
    shown_in: Counter[int] = Counter()
    sizes = {"small": 0, "medium": 0, "large": 0}
    heights: Counter[int] = Counter()
    ignored = masks = unlabeled = most = 0
    for scanned in images:
        own = [a for a in scanned if not a.ignore]
        ignored += len(scanned) - len(own)
        masks += sum(a.mask is not None for a in own)
        unlabeled += not own
        most = max(most, len(own))
        objects.update(a.label for a in own)
        shown_in.update({a.label for a in own})
        for a in own:
            sizes["small" if a.area < SMALL else "medium" if a.area < MEDIUM else "large"] += 1
            heights[2 ** max(0, math.floor(math.log2(a.box[3] - a.box[1])))] += 1
    low, high = (min(heights), max(heights)) if heights else (1, 0)
    steps = [2**k for k in range(int(math.log2(low)), int(math.log2(high)) + 1)] if high else []
    return CheckReport(
        data=dataset.spec,
        images=len(dataset),
        objects=objects.total(),
        most_objects=most,
        ignored=ignored,
        masks=masks,
        unlabeled=unlabeled,
        findings=[*findings, *no_objects(dataset, objects.total()), *_unused(dataset, objects)],
        classes=[
            ClassCount(name=name, objects=objects[k], images=shown_in[k])
            for k, name in enumerate(dataset.classes.names)
        ],
        sizes=sizes,
        heights={step: heights[step] for step in steps},
    )


def _unused(dataset: Dataset, objects: Counter[int]) -> list[Finding]:
    """Classes of a data YAML that no label is of: in a small set a matter of course, or misspelt.

    Formats whose files list no classes take any name; all that is in none may be ignored.
    """
    asked = parse_spec(dataset.spec)[1].classes if dataset.spec.endswith(_YAML) else None
    names = dataset.classes.names
    unused = [name for name in asked or () if name in names and not objects[names.index(name)]]
    if not unused or not objects:
        return []
    told = UserError("class-unused", f"{dataset.spec}: no object of {', '.join(unused)}")
    return [Finding(severity="warning", code=told.code, message=told.message)]
