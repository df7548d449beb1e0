"""Writes synthetic scenes as a KITTI or a COCO folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from detr.cli_support import progress
from detr.data.synth.scene import CLASSES, IGNORED, Scene, SceneObject, render
from detr.errors import UserError
from detr.files import output_error
from detr.masks import encode

Format = Literal["kitti", "coco"]

MANIFEST = "synth.json"
# Larger scenes take gigabytes to paint.
MIN_SIDE, MAX_SIDE = 32, 4096
VERSION = 1  # of the scenes: raised when the same seed gives other pictures


def generate(
    out: Path,
    images: int,
    size: tuple[int, int],
    seed: int,
    format: Format = "kitti",
    val_fraction: float = 0.2,
) -> None:
    """Writes ``images`` scenes with labels and a train/val split.

    Scene ``i`` and its split depend on ``seed``, ``size`` and ``i`` alone, so a larger set begins
    with the smaller one. The folder appears in one step when it is complete; asking again for what
    is already there returns at once.

    Args:
        out: Folder to make.
        images: How many.
        size: (height, width) in pixels, 32 to 4096 each.
        seed: Of the random generator, not negative.
        format: Folder layout.
        val_fraction: Share of the images in ``val``, between 0 and 1.

    Raises:
        UserError: ``output-exists`` where the folder holds anything else; ``synth-spec`` for
            numbers out of range; ``output-unwritable`` or ``disk-full``.
    """
    sizes_fit = min(size) >= MIN_SIDE and max(size) <= MAX_SIDE
    if images < 1 or not sizes_fit or seed < 0 or not 0 < val_fraction < 1:
        raise UserError(
            "synth-spec",
            f"{out}: needs at least 1 image of {MIN_SIDE}x{MIN_SIDE} to {MAX_SIDE}x{MAX_SIDE}, a "
            "seed of at least 0 and a val fraction between 0 and 1; got "
            f"{images}, {size[0]}x{size[1]}, {seed}, {val_fraction}",
        )
    manifest = {
        "version": VERSION,
        "images": images,
        "size": list(size),
        "seed": seed,
        "format": format,
        "val_fraction": val_fraction,
    }
    if _already_there(out, manifest):
        return
    part: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        part.chmod(0o755)
        scenes = ((i, render(size, seed, i)) for i in range(images))
        shown = iter(progress(scenes, f"scenes in {out}", total=images))
        split = [_is_val(i, val_fraction) for i in range(images)]
        (_write_kitti if format == "kitti" else _write_coco)(part, shown, split)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        os.replace(part, out)
    except OSError as error:
        raise output_error(out, error) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _already_there(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``out`` is this very set; refuses a folder with anything else in it."""
    if not out.exists():
        return False
    try:
        if out.is_dir() and not any(out.iterdir()):
            return False
        found = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    if found == manifest:
        return True
    what = "other synthetic scenes" if isinstance(found, dict) else "something else"
    raise UserError("output-exists", f"{out}: holds {what}; remove it or choose another folder")


def _is_val(i: int, fraction: float) -> bool:
    """Every so many-th image, from the second on, so that two images already fill both splits."""
    share = round(fraction * 1000)
    return (i * share + 1000 - share) // 1000 > ((i - 1) * share + 1000 - share) // 1000


def kitti_row(found: SceneObject, above_ground: float) -> str:
    """One line of a KITTI label file, 15 columns."""
    box = " ".join(f"{v:.2f}" for v in found.box)
    if found.type == IGNORED:
        return f"{IGNORED} -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10"
    place = found.place
    height, width, length = found.size
    alpha = place.yaw - float(np.arctan2(place.x, place.z))
    alpha, yaw = ((a + np.pi) % (2 * np.pi) - np.pi for a in (alpha, place.yaw))
    return (
        f"{found.type} {found.truncated:.2f} {found.occluded} {alpha:.2f} {box} "
        f"{height:.2f} {width:.2f} {length:.2f} "
        f"{place.x:.2f} {above_ground:.2f} {place.z:.2f} {yaw:.2f}"
    )


def _write_kitti(root: Path, scenes: Iterator[tuple[int, Scene]], split: list[bool]) -> None:
    pictures, labels, sets = (
        root / "training" / "image_2",
        root / "training" / "label_2",
        root / "ImageSets",
    )
    for folder in (pictures, labels, sets):
        folder.mkdir(parents=True)
    for i, scene in scenes:
        Image.fromarray(scene.image).save(pictures / f"{i:06d}.png", compress_level=3)
        rows = [kitti_row(found, scene.above_ground) + "\n" for found in scene.objects]
        (labels / f"{i:06d}.txt").write_text("".join(rows))
    for name, members in (
        ("train", [i for i, val in enumerate(split) if not val]),
        ("val", [i for i, val in enumerate(split) if val]),
        ("trainval", list(range(len(split)))),
    ):
        (sets / f"{name}.txt").write_text("".join(f"{i:06d}\n" for i in members))


def _write_coco(root: Path, scenes: Iterator[tuple[int, Scene]], split: list[bool]) -> None:
    names = {True: "val", False: "train"}
    ids = {name: i for i, name in enumerate(CLASSES, start=1)}
    files: dict[bool, dict[str, list[dict[str, Any]]]] = {}
    for is_val, name in names.items():
        (root / f"{name}2017").mkdir()
        categories = [{"id": i, "name": n, "supercategory": "road"} for n, i in ids.items()]
        files[is_val] = {"images": [], "annotations": [], "categories": categories}
    number = 0
    for i, scene in scenes:
        is_val = split[i]
        name = f"{i + 1:012d}.png"
        Image.fromarray(scene.image).save(root / f"{names[is_val]}2017" / name, compress_level=3)
        height, width = scene.image.shape[:2]
        files[is_val]["images"].append(
            {"id": i + 1, "file_name": name, "height": height, "width": width}
        )
        for found in scene.objects:
            # COCO has no region for every class, so a DontCare becomes one crowd per class.
            ignored = found.type == IGNORED
            x0, y0, x1, y1 = (round(v, 2) for v in found.box)
            mask = encode(found.mask).to_json()
            for category in ids.values() if ignored else (ids[found.type],):
                number += 1
                files[is_val]["annotations"].append(
                    {
                        "id": number,
                        "image_id": i + 1,
                        "category_id": category,
                        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                        "segmentation": mask,
                        # The box's: of partly hidden objects it tells how large they are.
                        "area": round((x1 - x0) * (y1 - y0), 2),
                        "iscrowd": int(ignored),
                    }
                )
    (root / "annotations").mkdir()
    for is_val, name in names.items():
        (root / "annotations" / f"instances_{name}2017.json").write_text(
            json.dumps(files[is_val]) + "\n"
        )
