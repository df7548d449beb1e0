"""KITTI 2-D object folders: ``training/image_2``, ``training/label_2``, ``ImageSets/SPLIT.txt``.

Column layout after the devkit of the KITTI object benchmark (Geiger et al., CVPR 2012): type,
truncated, occluded, alpha, x0 y0 x1 y1, height width length, x y z, rotation_y and, in results,
score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from detr.config import ClassMap
from detr.data.formats.labelled import TEXT, FileDataset, Row, Scan, existing
from detr.data.images import SUFFIXES
from detr.data.policy import IGNORE, ClassPolicy
from detr.errors import UserError

KITTI_CLASSES = ClassMap(
    names=("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram"),
    category_ids=(1, 2, 3, 4, 5, 6, 7),
)
ALWAYS_IGNORED = frozenset({"DontCare", "Misc"})


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
    """

    type: str
    truncated: float
    occluded: int
    alpha: float
    box: tuple[float, float, float, float]
    score: float | None = None
    line: int = 0


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
        lines = path.read_text(encoding=TEXT).splitlines()
    except FileNotFoundError:
        return [], [UserError("label-missing", f"{path}: no such label file")]
    except UnicodeDecodeError:
        return [], [UserError("label-unreadable", f"{path}: not a text file")]
    except OSError as error:
        return [], [UserError("label-unreadable", f"{path}: {error.strerror or error}")]
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
        try:
            values.append(float(text))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
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
    )


class KittiDataset(FileDataset):
    """Frames of a KITTI folder, with or without a split file.

    Args:
        root: Folder that holds ``training``.
        split: Name of a file in ``ImageSets``; None takes every frame there is.
        policy: What becomes of the names in the label files.
        spec: For messages.

    Raises:
        UserError: ``data-missing``, ``split-missing`` or ``split-row``.
    """

    def __init__(self, root: Path, split: str | None, policy: ClassPolicy, spec: str) -> None:
        super().__init__()
        self.spec = spec
        self.classes = policy.classes
        self._policy = policy
        self._label_folder = existing(existing(root) / "training") / "label_2"
        self._image_folder = root / "training" / "image_2"
        self._images = _by_stem(self._image_folder, SUFFIXES)
        self._label_stems = set(_by_stem(self._label_folder, (".txt",)))
        self._whole = split is None
        # Without pictures (labels only, for scoring) the label files are the frames.
        everything = sorted(self._images or self._label_stems)
        self.frames = everything if split is None else _read_split(root, split)
        if not self.frames:
            raise UserError("data-missing", f"{spec}: no frames in {self._image_folder}")
        numbers = [int(stem) if stem.isdecimal() else -1 for stem in self.frames]
        usable = min(numbers) >= 0 and len(set(numbers)) == len(numbers)
        self._ids = numbers if usable else list(range(1, len(numbers) + 1))

    def __len__(self) -> int:
        return len(self.frames)

    def image_id(self, i: int) -> int:
        """The frame number; the position from 1 where file names are no numbers."""
        return self._ids[i]

    def image_path(self, i: int) -> Path:
        """Path of the PNG or JPEG."""
        stem = self.frames[i]
        return self._images.get(stem, self._image_folder / f"{stem}.png")

    def label_path(self, i: int) -> Path:
        """Path of the label file."""
        return self._label_folder / f"{self.frames[i]}.txt"

    def objects(self, i: int) -> list[KittiObject]:
        """The rows of frame ``i`` as they are, ``DontCare`` included."""
        return read_label_file(self.label_path(i))

    def sources(self, name: str) -> set[str]:
        """Names in the label files that make up a class; none where there is no such class."""
        if name not in self.classes.names:
            return set()
        merged = {source for source, became in self._policy.merged.items() if became == name}
        own = set() if name in self._policy.merged else {name}
        return (merged | own) - self._policy.ignored

    def scan(self, i: int) -> Scan:
        """The rows of frame ``i`` as class indices."""
        path = self.label_path(i)
        objects, errors = scan_label_file(path)
        found = Scan(errors=errors)
        for o in objects:
            where = f"{path}:{o.line}"
            try:
                label = self._policy.index(o.type, where)
            except UserError as error:
                found.errors.append(error)
                continue
            area = max(0.0, o.box[2] - o.box[0]) * max(0.0, o.box[3] - o.box[1])
            found.rows.append(Row(where, o.box, area, label, label == IGNORE))
        return found

    def problems(self) -> list[UserError]:
        """Labels without a picture (a picture without labels shows when its labels are read)."""
        if not self._whole:
            return []
        return (
            [
                UserError(
                    "image-missing",
                    f"{self._label_folder / stem}.txt: has no image in {self._image_folder}",
                )
                for stem in sorted(self._label_stems - set(self._images))
            ]
            if self._images
            else []
        )


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    return {path.stem: path for path in reversed(found)}


def _read_split(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets"
    path = folder / f"{split}.txt"
    try:
        lines = path.read_text(encoding=TEXT).splitlines()
    except UnicodeDecodeError as error:
        raise UserError("split-row", f"{path}: not a text file") from error
    except OSError as error:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.txt"))) or "none"
        raise UserError("split-missing", f"{path}: no such split; there are: {there}") from error
    frames: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        stem = line.strip()
        if not stem:
            continue
        if stem in seen or len(stem.split()) > 1:
            what = "twice in the split" if stem in seen else "not one frame number"
            raise UserError("split-row", f"{path}:{number}: {stem!r} is {what}")
        seen.add(stem)
        frames.append(stem)
    return frames
