"""Writing a data set in a format: labels as the format has them, pictures copied or linked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import yaml

from detr.cli_support import counted, progress
from detr.data.coco_document import annotation_rows, coco_ground_truth
from detr.data.dataset import Annotation, Dataset
from detr.data.kitti_rows import UNKNOWN_3D
from detr.data.names import distinct_names
from detr.data.outline import single_polygon
from detr.errors import UserError
from detr.files import output_error, write_atomic


@dataclass(frozen=True)
class Target:
    """Where a data set goes.

    Attributes:
        root: Folder, made where it is missing; another split may lie in it already.
        split: Name of the split.
        link: Link to the pictures instead of copying them.
        polygons: Write masks in place of boxes, where a row holds one or the other.
    """

    root: Path
    split: str
    link: bool = False
    polygons: bool = False


# Returns what the format could not hold, one line each.
Writer = Callable[[Dataset, Target], list[str]]


def write_coco(dataset: Dataset, target: Target) -> list[str]:
    """``SPLIT/`` and ``annotations/instances_SPLIT.json``, with the masks there are."""
    path = target.root / "annotations" / f"instances_{target.split}.json"
    document = coco_ground_truth(dataset)
    pictures = _pictures(dataset, target, target.root / target.split, path)
    for i, (row, picture) in enumerate(zip(document["images"], pictures, strict=True)):
        height, width = _size(dataset, i)
        row |= {"file_name": picture.name, "height": height, "width": width}
    lost = 0
    for row, (_, _, told) in zip(document["annotations"], annotation_rows(dataset), strict=True):
        if told.mask is None:
            continue
        try:
            row["segmentation"] = told.mask().to_json()
        except UserError:  # a warning of detr data check: boxes are as good without
            lost += 1
    write_atomic(path, json.dumps(document) + "\n")
    return [f"{counted(lost, 'mask')} left out that cannot be read"] if lost else []


def write_yolo(dataset: Dataset, target: Target) -> list[str]:
    """``images/SPLIT``, ``labels/SPLIT`` and an entry in ``data.yaml``."""
    path = target.root / "data.yaml"
    names = list(dataset.classes.names)
    content = yaml.safe_load(path.read_text()) if path.exists() else {"path": ".", "names": names}
    if not isinstance(content, dict) or content.get("names") != names:
        raise UserError("output-exists", f"{path}: is of another data set, with other classes")
    if target.split in content:
        raise UserError("output-exists", f"{path}: has a split {target.split!r} already")
    labels = target.root / "labels" / target.split
    pictures = _pictures(dataset, target, target.root / "images" / target.split, labels)
    ignored = 0
    for i, picture in enumerate(pictures):
        height, width = _size(dataset, i)
        rows = []
        for a in dataset.annotations(i, masks=target.polygons):
            ignored += a.ignore
            if a.ignore:
                continue
            x0, y0, x1, y1 = a.box
            relative = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width,
                        (y1 - y0) / height]  # fmt: skip
            if target.polygons and a.mask is not None:
                outline = single_polygon(a.mask(), (height, width))
                relative = (outline / (width, height)).ravel().tolist()
            if relative:
                rows.append(f"{a.label} {' '.join(map(repr, relative))}\n")
        write_atomic(labels / f"{picture.stem}.txt", "".join(rows))
    content[target.split] = f"images/{target.split}"
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))
    return [f"{counted(ignored, 'ignore region')} left out: YOLO has none"] if ignored else []


def write_voc(dataset: Dataset, target: Target) -> list[str]:
    """``JPEGImages``, ``Annotations``, ``ImageSets/Main/SPLIT.txt``; boxes as corners, from 0."""
    path = target.root / "ImageSets" / "Main" / f"{target.split}.txt"
    pictures = _pictures(dataset, target, target.root / "JPEGImages", path)
    lost = 0
    for i, picture in enumerate(pictures):
        annotations = dataset.annotations(i)
        lost += sum(a.label < 0 for a in annotations)
        text = _voc_xml(
            picture.name, _size(dataset, i), [a for a in annotations if a.label >= 0],
            dataset.classes.names,
        )  # fmt: skip
        write_atomic(target.root / "Annotations" / f"{picture.stem}.xml", text)
    write_atomic(path, "".join(f"{picture.stem}\n" for picture in pictures))
    if not lost:
        return []
    return [f"{counted(lost, 'ignore region')} left out: VOC has none for every class"]


def _voc_xml(
    name: str, size: tuple[int, int], annotations: Sequence[Annotation], names: Sequence[str]
) -> str:
    lines = [
        "<annotation>",
        f"  <filename>{escape(name)}</filename>",
        "  <source><database>Unknown</database></source>",
        f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>",
    ]
    for a in annotations:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), a.box, strict=True)
        lines += [
            "  <object>",
            f"    <name>{escape(names[a.label])}</name>",
            f"    <difficult>{int(a.ignore)}</difficult>",
            f"    <bndbox>{''.join(f'<{tag}>{v!r}</{tag}>' for tag, v in corners)}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def write_kitti(dataset: Dataset, target: Target) -> list[str]:
    """``training/image_2``, ``training/label_2`` and ``ImageSets/SPLIT.txt``.

    Occlusion is written as unknown (3), which KITTI AP counts at no difficulty.
    """
    for name in dataset.classes.names:
        if len(name.split()) != 1:
            raise UserError(
                "convert-name",
                f"class {name!r}: a KITTI row ends a name at a space; give it another in a data "
                f"YAML: classes: {{{'_'.join(name.split())}: [{name!r}]}}",
            )
    path = target.root / "ImageSets" / f"{target.split}.txt"
    training = target.root / "training"
    pictures = _pictures(dataset, target, training / "image_2", path)
    for i, picture in enumerate(pictures):
        rows = [
            f"{'DontCare -1 -1' if a.ignore else f'{dataset.classes.names[a.label]} -1 3'} -10 "
            f"{' '.join(map(repr, a.box))} {UNKNOWN_3D}\n"
            for a in dataset.annotations(i)
        ]
        write_atomic(training / "label_2" / f"{picture.stem}.txt", "".join(rows))
    write_atomic(path, "".join(f"{picture.stem}\n" for picture in pictures))
    return [
        "occlusion and truncation are written as unknown: KITTI AP will find no object to count"
    ]


def _size(dataset: Dataset, i: int) -> tuple[int, int]:
    return dataset.bounds(i) or dataset.image_size(i)


def _pictures(dataset: Dataset, target: Target, folder: Path, mark: Path) -> list[Path]:
    """Copies or links all pictures into a folder.

    Args:
        dataset: Whose pictures.
        target: Copy or link.
        folder: Where to.
        mark: What is there once the split has been written.

    Raises:
        UserError: ``output-exists``, ``disk-full`` or ``output-unwritable``.
    """
    if mark.exists():
        raise UserError(
            "output-exists", f"{mark}: is there already; choose another folder or split"
        )
    sources = [dataset.image_path(i) for i in range(len(dataset))]
    names = distinct_names(sources)
    copies = [folder / f"{n}{path.suffix}" for n, path in zip(names, sources, strict=True)]
    taken = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    for copy in copies:
        if copy.stem in taken:
            raise UserError(
                "output-exists", f"{copy}: an image of this name is in {folder} already"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source, copy in progress(
            list(zip(sources, copies, strict=True)), f"pictures of {dataset.spec}"
        ):
            if target.link:
                os.symlink(source.resolve(), copy)
            else:
                shutil.copyfile(source, copy)
    except OSError as error:
        raise output_error(folder, error) from error
    return copies
