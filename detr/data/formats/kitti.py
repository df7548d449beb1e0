"""KITTI 2-D object folders: ``training/image_2``, ``training/label_2``, ``ImageSets/SPLIT.txt``."""

from __future__ import annotations

from pathlib import Path

from detr.config import ClassMap
from detr.data.dataset import Annotation, Protocols, Scan
from detr.data.formats.base import DataFormat, FileDataset, existing
from detr.data.images import SUFFIXES
from detr.data.kitti_rows import KittiObject, read_label_file, scan_label_file
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.spec import DataSpec
from detr.errors import UserError
from detr.files import TEXT

KITTI_CLASSES = ClassMap(
    names=("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram"),
    category_ids=(1, 2, 3, 4, 5, 6, 7),
)
ALWAYS_IGNORED = frozenset({"DontCare", "Misc"})


class KittiDataset(FileDataset):
    """Frames of a KITTI folder, with or without a split file.

    Args:
        source: Its path holds ``training``, its split is the name of a file in ``ImageSets``; None
            takes every frame there is.
        policy: What becomes of the names in the label files.
        spec: For messages.

    Raises:
        UserError: ``data-missing``, ``split-missing`` or ``split-row``.
    """

    def __init__(self, source: DataSpec, policy: ClassPolicy, spec: str) -> None:
        super().__init__(source, policy, spec)
        root, split = source.path, source.split
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

    @property
    def protocols(self) -> Protocols:
        """KITTI's own besides COCO's."""
        return Protocols(kitti=self)

    def objects(self, i: int) -> list[KittiObject]:
        """The rows of frame ``i``, ``DontCare`` included, but for boxes that do not count."""
        path = self.label_path(i)
        rows = read_label_file(path)
        lost = {a.where for a in self.read(i).annotations} - {
            a.where for a in self.scan(i).annotations
        }
        return [row for row in rows if f"{path}:{row.line}" not in lost]

    def sources(self, name: str) -> set[str]:
        """Names in the label files that make up a class; none where there is no such class."""
        if name not in self.classes.names:
            return set()
        merged = {source for source, became in self.policy.merged.items() if became == name}
        own = set() if name in self.policy.merged else {name}
        return (merged | own) - self.policy.ignored

    def read(self, i: int) -> Scan:
        """The rows of frame ``i`` as class indices."""
        path = self.label_path(i)
        objects, errors = scan_label_file(path)
        found = Scan(errors=errors)
        for o in objects:
            where = f"{path}:{o.line}"
            try:
                label = self.policy.index(o.type, where)
            except UserError as error:
                found.errors.append(error)
                continue
            area = max(0.0, o.box[2] - o.box[0]) * max(0.0, o.box[3] - o.box[1])
            found.annotations.append(Annotation(where, o.box, area, label, label == IGNORE))
        return found

    def read_problems(self) -> list[UserError]:
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


def _open(source: DataSpec, classes: ClassMap | None, spec: str) -> KittiDataset:
    policy = source.policy(classes, KITTI_CLASSES, spec, ALWAYS_IGNORED)
    return KittiDataset(source, policy, spec)


KITTI = DataFormat(name="kitti", spec=DataSpec, open=_open)
