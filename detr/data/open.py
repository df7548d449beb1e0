"""Opening a data set by what the user typed."""

from __future__ import annotations

from pathlib import Path

from detr.config import ClassMap
from detr.data.dataset import Dataset
from detr.data.formats.coco import CocoDataset, CocoFile, annotation_file
from detr.data.formats.kitti import ALWAYS_IGNORED, KITTI_CLASSES, KittiDataset
from detr.data.policy import ClassPolicy, merge_map
from detr.data.yaml_spec import DataSpec, read_data_spec
from detr.errors import UserError


def open_dataset(spec: str, classes: ClassMap | None = None) -> Dataset:
    """Opens ``kitti:PATH[:split]``, ``coco:PATH[:split]`` or a YAML file.

    Without a split, KITTI gives every frame, and COCO the only annotation file there is.

    Args:
        spec: What the user typed.
        classes: Class indices to use, usually a model's: the set's names are mapped onto it by
            name. None gives the set's own.

    Raises:
        UserError: ``data-spec``, ``data-missing``, ``split-missing``, ``data-yaml``,
            ``coco-json``. A class name that is not in ``classes`` is ``class-not-in-map`` when the
            labels that hold it are read.
    """
    form, colon, rest = spec.partition(":")
    if form in ("kitti", "coco") and colon and rest:
        path, split = _split_of(rest)
        parsed = DataSpec.model_validate({"format": form, "path": path, "split": split})
    elif spec.endswith((".yaml", ".yml")):
        parsed = read_data_spec(Path(spec).expanduser())
    else:
        raise UserError(
            "data-spec",
            f"{spec!r}: expected kitti:PATH[:split], coco:PATH[:split] or a .yaml file",
        )
    merged = merge_map(parsed.classes or {}, spec)
    ignored = frozenset(parsed.ignore)
    if parsed.format == "kitti":
        if classes is None:
            classes = (
                KITTI_CLASSES
                if parsed.classes is None
                else ClassMap(
                    names=tuple(parsed.classes),
                    category_ids=tuple(range(1, len(parsed.classes) + 1)),
                )
            )
        # Misc may be asked for by name; DontCare is never an object.
        always = ALWAYS_IGNORED - (merged.keys() - {"DontCare"})
        policy = ClassPolicy(classes, merged, ignored | always)
        return KittiDataset(parsed.path, parsed.split, policy, spec)
    file = CocoFile(annotation_file(parsed.path, parsed.split))
    if classes is None:
        classes = (
            file.default_classes()
            if parsed.classes is None
            else file.merged_classes(parsed.classes)
        )
    return CocoDataset(file, ClassPolicy(classes, merged, ignored), spec)


def _split_of(rest: str) -> tuple[Path, str | None]:
    """Path and split; a path that exists may hold colons itself."""
    whole = Path(rest).expanduser()
    head, colon, split = rest.rpartition(":")
    if whole.exists() or not colon or not head or "/" in split:
        return whole, None
    return Path(head).expanduser(), split
