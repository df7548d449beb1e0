"""KITTI 2-D object folders: ``training/image_2``, ``training/label_2``, ``ImageSets/SPLIT.txt``."""

from __future__ import annotations

from detr.config import ClassMap
from detr.data.dataset import Annotation, Protocols, Scan
from detr.data.formats.base import DataFormat, existing
from detr.data.formats.pairs import PairedDataset, read_split
from detr.data.formats.writers import write_kitti
from detr.data.kitti_rows import KittiObject, read_label_file, scan_label_file
from detr.data.policy import IGNORE, ClassPolicy
from detr.data.spec import DataSpec
from detr.errors import UserError

KITTI_CLASSES = ClassMap(
    names=("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram"),
    category_ids=(1, 2, 3, 4, 5, 6, 7),
)
ALWAYS_IGNORED = frozenset({"DontCare", "Misc"})


class KittiDataset(PairedDataset):
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
        root, split = source.path, source.split
        training = existing(existing(root) / "training")
        frames = None if split is None else read_split(root / "ImageSets", split)
        super().__init__(
            training / "image_2", training / "label_2", ".txt", frames, source, policy, spec
        )

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
            found.annotations.append(
                Annotation(where, o.box, area, label, label == IGNORE, o.attributes)
            )
        return found


def _open(source: DataSpec, classes: ClassMap | None, spec: str) -> KittiDataset:
    policy = source.policy(classes, KITTI_CLASSES, spec, ALWAYS_IGNORED)
    return KittiDataset(source, policy, spec)


KITTI = DataFormat(
    name="kitti",
    spec=DataSpec,
    open=_open,
    write=write_kitti,
    lists=lambda source: source.path / "ImageSets",
)
