"""Rows of KITTI label and result files.

Column layout after the devkit of the KITTI object benchmark (Geiger et al., CVPR 2012): type,
truncated, occluded, alpha, x0 y0 x1 y1, height width length, x y z, rotation_y and, in results,
score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from detr.data import fields
from detr.errors import UserError

OCCLUSIONS = {0: "visible", 1: "partly", 2: "largely", 3: "unknown"}
# Size, place and rotation of a row that tells of the image only.
UNKNOWN_3D = "-1 -1 -1 -1000 -1000 -1000 -10"


@dataclass(frozen=True)
class KittiObject:
    """One row of a label or result file.

    Attributes:
        type: Class name as in the file.
        truncated: 0..1 share outside the image; -1 unknown.
        occluded: 0 visible, 1 partly, 2 largely hidden, 3 unknown; -1 in regions and results.
        alpha: Observation angle in radians.
        box: x0 y0 x1 y1 pixels.
        score: Of a result row, else None.
        line: Line of the file, from 1.
        location: Of the object's bottom center in camera coordinates, meters (right, down, ahead);
            None where the row does not tell.
    """

    type: str
    truncated: float
    occluded: int
    alpha: float
    box: tuple[float, float, float, float]
    score: float | None = None
    line: int = 0
    location: tuple[float, float, float] | None = None

    @property
    def attributes(self) -> dict[str, float | str]:
        """What the row tells of an object beside class and box."""
        found: dict[str, float | str] = {}
        if self.occluded in OCCLUSIONS:
            found["occlusion"] = OCCLUSIONS[self.occluded]
        if self.truncated >= 0:
            found["truncation"] = self.truncated
        if self.location is not None:
            found["distance"] = math.hypot(self.location[0], self.location[2])
        return found


class KittiLabels(Protocol):
    """The labels of a data set as KITTI's evaluation protocol needs them."""

    def objects(self, i: int) -> list[KittiObject]:
        """The rows of image ``i`` as they are, ``DontCare`` and classes that do not count too."""

    def sources(self, name: str) -> set[str]:
        """Names in the label files that make up a class; none where there is no such class."""


def read_label_file(path: Path) -> list[KittiObject]:
    """All objects of a label file (15 columns) or a result file (16, the last is the score).

    Raises:
        UserError: ``label-missing``, ``label-unreadable``, ``kitti-label-columns`` or
            ``kitti-label-value`` for the first bad row, naming file and line.
    """
    objects, errors = scan_label_file(path)
    if errors:
        raise errors[0]
    return objects


def scan_label_file(path: Path) -> tuple[list[KittiObject], list[UserError]]:
    """All objects of a file that can be read, and an error for every row that cannot."""
    try:
        lines = fields.read_lines(path)
    except UserError as error:
        return [], [error]
    objects: list[KittiObject] = []
    errors: list[UserError] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                objects.append(_parse(line.split(), f"{path}:{number}", number))
            except UserError as error:
                errors.append(error)
    return objects, errors


def _parse(columns: list[str], where: str, line: int) -> KittiObject:
    if len(columns) not in (15, 16):
        raise UserError(
            "kitti-label-columns",
            f"{where}: {len(columns)} columns, expected 15 (or 16 with a score)",
        )
    values: list[float] = []
    for k, text in enumerate(columns[1:], start=2):
        values.append(fields.parse_number(text))
        if math.isnan(values[-1]):
            raise UserError("kitti-label-value", f"{where}: column {k} is {text!r}, not a number")
    x0, y0, x1, y1 = values[3:7]
    return KittiObject(
        type=columns[0],
        truncated=values[0],
        occluded=int(values[1]),
        alpha=values[2],
        box=(x0, y0, x1, y1),
        score=values[14] if len(values) == 15 else None,
        line=line,
        location=None if min(values[10:13]) <= -1000 else (values[10], values[11], values[12]),
    )
