"""A data set in another format, and a data set in two parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel

from detr.data.dataset import Dataset
from detr.data.findings import inspect
from detr.data.formats.registry import OURS
from detr.data.formats.writers import Target
from detr.data.open import open_dataset, parse_spec, split_of
from detr.data.subset import short_names
from detr.errors import UserError
from detr.files import write_atomic


class Converted(BaseModel):
    """What was written.

    Attributes:
        data: As every command takes it.
        images, objects: How many.
        notes: What the format could not hold, and what was left out of the source.
    """

    data: str
    images: int
    objects: int
    notes: list[str]


def convert(source: str, to: str, link: bool = False, polygons: bool = False) -> Converted:
    """Writes a data set in another format.

    Args:
        source: Data set specification.
        to: ``FORMAT:FOLDER[:SPLIT]``; the source's split, or ``train``, where none is named.
        link: Link to the pictures instead of copying them.
        polygons: Write masks into YOLO rows, in place of boxes.

    Raises:
        UserError: ``convert-format`` where ``to`` is no format that can be written, or polygons are
            asked for of another than YOLO, what is wrong
            with the source (:func:`detr.data.inspect`), ``convert-name``, ``output-exists``.
    """
    name, _, rest = to.partition(":")
    form = next((form for form in OURS if form.name == name), None)
    if form is None or form.write is None or not rest:
        names = ", ".join(form.name for form in OURS if form.write is not None)
        raise UserError("convert-format", f"{to!r}: expected FORMAT:FOLDER[:SPLIT], one of {names}")
    if polygons and name != "yolo":
        raise UserError(
            "convert-format", f"{to!r}: --polygons is for YOLO; COCO keeps masks anyway"
        )
    dataset = open_dataset(source)
    findings = inspect(dataset, masks=polygons)
    findings.stop()
    root, split = split_of(rest)
    split = split or parse_spec(source)[1].split or "train"
    notes = form.write(dataset, Target(root, split, link, polygons))
    if name != "coco" and _has_areas(dataset):
        notes.append("areas of masks are lost: AP by size will go by those of boxes")
    if name != "coco" and not polygons and _has_masks(dataset):
        notes.append(
            "masks are left out: a row holds a box or a polygon, and --polygons writes those"
            if name == "yolo"
            else f"masks are left out: {name} has none"
        )
    if findings.warnings:
        notes.append(findings.summary())
    if dataset.exif is not None:
        notes.append(f"say exif: {dataset.exif} in a data YAML of it again")
    if dataset.value_range is not None:
        notes.append(f"say range: {list(dataset.value_range)} in a data YAML of it again")
    return Converted(
        data=f"{name}:{root}:{split}",
        images=len(dataset),
        objects=findings.objects,
        notes=notes,
    )


def _has_masks(dataset: Dataset) -> bool:
    return any(a.mask is not None for i in range(len(dataset)) for a in dataset.annotations(i))


def _has_areas(dataset: Dataset) -> bool:
    """Whether areas are told that are not those of the boxes."""
    for i in range(len(dataset)):
        for a in dataset.annotations(i):
            box = (a.box[2] - a.box[0]) * (a.box[3] - a.box[1])
            if not a.ignore and abs(a.area - box) > 0.01 * box:
                return True
    return False


class Parts(BaseModel):
    """The two parts of a data set.

    Attributes:
        train, val: As every command takes them.
        train_images, val_images: How many.
    """

    train: str
    val: str
    train_images: int
    val_images: int


def split(source: str, val: float, seed: int, out: Path | None = None) -> Parts:
    """Divides a data set at random; its own files stay as they are.

    KITTI and VOC get ``train.txt`` and ``val.txt`` among their lists of images; for any other data
    set ``train.yaml`` and ``val.yaml`` are written, with a list of images each.

    Args:
        source: Data set specification.
        val: Share of the images in ``val``, between 0 and 1.
        seed: Of the random choice, which else depends on the images' names alone.
        out: Folder for the lists; by default the data set's own.

    Raises:
        UserError: ``split-share`` where a part would be empty, ``output-exists``.
    """
    form, spec = parse_spec(source)
    dataset = open_dataset(source)
    names = short_names(dataset)
    chosen = sorted(names)
    count = round(val * len(chosen))
    if not 0 < count < len(chosen):
        raise UserError(
            "split-share",
            f"--val {val:g}: of {len(chosen)} images {count} would be in val; both parts need some",
        )
    order = np.random.default_rng(seed).permutation(len(chosen))
    parts = {
        "train": sorted(chosen[k] for k in order[count:]),
        "val": sorted(chosen[k] for k in order[:count]),
    }
    lists = form.lists(spec) if out is None else None
    folder = lists or out or (spec.path if spec.path.is_dir() else spec.path.parent)
    _must_be_new([folder / f"{part}.{s}" for part in parts for s in ("txt", "yaml")])
    specs = []
    for part, members in parts.items():
        if lists is not None:
            members = [Path(member).stem for member in members]
            specs.append(f"{form.name}:{spec.path}:{part}")
        else:
            content = spec.model_dump(mode="json", exclude_defaults=True)
            content |= {"path": str(spec.path.resolve()), "only": f"{part}.txt"}
            write_atomic(folder / f"{part}.yaml", yaml.safe_dump(content, sort_keys=False))
            specs.append(str(folder / f"{part}.yaml"))
        write_atomic(folder / f"{part}.txt", "".join(f"{member}\n" for member in members))
    return Parts(train=specs[0], val=specs[1], train_images=len(chosen) - count, val_images=count)


def _must_be_new(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError("output-exists", f"{path}: is there already; choose another --out")
