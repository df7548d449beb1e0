from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr.data import open_dataset
from detr.data.check import check
from detr.data.formats.base import FileDataset
from detr.data.kitti_rows import read_label_file
from detr.data.synth import CLASSES, generate, render, scene, scenery
from detr.data.synth.camera import Patch
from detr.errors import UserError
from detr.types import ImageArray

SIZE = (96, 320)


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_bytes_and_a_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    for name, images, seed in (("a", 6, 3), ("b", 6, 3), ("more", 8, 3), ("other", 6, 4)):
        generate(tmp_path / name, images, SIZE, seed)
    a, b, more, other = (digest(tmp_path / name) for name in ("a", "b", "more", "other"))
    assert a == b
    frames = [name for name in a if name.startswith("training")]
    assert len(frames) == 12 and all(more[name] == a[name] for name in frames)
    assert all(other[n] != a[n] for n in frames if n.endswith(".png"))


def test_kitti_round_trip(tmp_path: Path) -> None:
    generate(tmp_path / "k", 10, SIZE, 5)
    data = open_dataset(f"kitti:{tmp_path / 'k'}")
    for i in range(len(data)):
        scene = render(SIZE, 5, i)
        assert np.array_equal(data.image(i), scene.image)
        rows = read_label_file(tmp_path / "k" / "training" / "label_2" / f"{i:06d}.txt")
        assert [r.type for r in rows] == [o.type for o in scene.objects]
        assert np.allclose([r.box for r in rows], [o.box for o in scene.objects], atol=0.006)
    train, val = (open_dataset(f"kitti:{tmp_path / 'k'}:{s}") for s in ("train", "val"))
    assert (len(train), len(val)) == (8, 2)
    assert {train.image_id(i) for i in range(8)}.isdisjoint({val.image_id(i) for i in range(2)})


def test_both_formats_check_clean_and_hold_the_same(tmp_path: Path) -> None:
    for form in ("kitti", "coco"):
        generate(tmp_path / form, 10, SIZE, 5, form)
    kitti, coco = (open_dataset(f"{f}:{tmp_path / f}:train") for f in ("kitti", "coco"))
    assert coco.classes.names == CLASSES and len(kitti) == len(coco) == 8
    for i in range(len(coco)):
        a, b = kitti.labels(i), coco.labels(i)
        assert np.allclose(a.boxes, b.boxes, atol=0.02)
        assert [kitti.classes.names[k] for k in a.labels] == [
            coco.classes.names[k] for k in b.labels
        ]
        assert len(b.ignore) == len(a.ignore) * len(CLASSES)
    for data in (kitti, coco):
        assert isinstance(data, FileDataset) and check(data).findings == []


@pytest.mark.slow
def test_scenes_are_what_a_detector_needs() -> None:
    objects = [o for i in range(60) for o in render(SIZE, 0, i).objects]
    kept = [o for o in objects if o.type != "DontCare"]
    assert {o.type for o in kept} == set(CLASSES) and len(kept) < len(objects)
    assert {o.occluded for o in kept} == {0, 1, 2} and any(o.truncated > 0.1 for o in kept)
    heights = np.array([o.box[3] - o.box[1] for o in kept])
    assert heights.min() >= SIZE[0] * 25 / 375
    for o in kept:
        x0, y0, x1, y1 = o.box
        assert 0 <= x0 < x1 < SIZE[1] and 0 <= y0 < y1 < SIZE[0]
    whole = [o for o in kept if o.type == "Car" and o.truncated == 0]
    near = [o.box[3] - o.box[1] for o in whole if o.place.z < 15]
    far = [o.box[3] - o.box[1] for o in whole if o.place.z > 30]
    assert min(near) > max(far)  # size falls with distance


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(out, 2, SIZE, 1)
    before = digest(out)
    generate(out, 2, SIZE, 1)  # the same again is no error
    assert digest(out) == before
    for images, seed in ((3, 1), (2, 2)):
        with pytest.raises(UserError, match="synthetic scenes") as caught:
            generate(out, images, SIZE, seed)
        assert caught.value.code == "output-exists"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError) as caught:
        generate(tmp_path / "mine", 2, SIZE, 1)
    assert caught.value.code == "output-exists" and digest(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]  # nothing left over


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(UserError) as caught:
        generate(tmp_path / "out", 2, SIZE, 1)
    assert caught.value.code == "disk-full" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "size", "seed", "share"),
    [
        (0, SIZE, 0, 0.2),
        (1, (8, 320), 0, 0.2),
        (1, (9999, 320), 0, 0.2),
        (1, SIZE, -1, 0.2),
        (1, SIZE, 0, 1.0),
    ],
)
def test_numbers_out_of_range(
    tmp_path: Path, images: int, size: tuple[int, int], seed: int, share: float
) -> None:
    with pytest.raises(UserError) as caught:
        generate(tmp_path / "out", images, size, seed, val_fraction=share)
    assert caught.value.code == "synth-spec"


def test_manifest_tells_how_to_make_it_again(tmp_path: Path) -> None:
    generate(tmp_path / "out", 2, SIZE, 9, "coco", 0.5)
    manifest = json.loads((tmp_path / "out" / "synth.json").read_text())
    assert manifest["seed"] == 9 and manifest["size"] == list(SIZE)
    assert len(open_dataset(f"coco:{tmp_path / 'out'}:val")) == 1


def test_masks_are_the_pixels_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painted in one color each, objects show where their masks are."""

    def flat(
        self: scene._Canvas,
        patches: list[Patch],
        owner: int | None = None,
        draw: Any = scene._Canvas.draw,
    ) -> None:
        red = float(owner) if owner is not None and owner < 255 else 0.0
        draw(self, [(outline, (red, 0.0, 0.0)) for outline, _ in patches], owner)

    def samples(canvas: scene._Canvas, *_: object) -> ImageArray:
        return np.asarray(canvas.picture)

    monkeypatch.setattr(scene._Canvas, "draw", flat)
    monkeypatch.setattr(scene, "_finish", samples)
    monkeypatch.setattr(scenery, "sky", lambda *_: np.zeros((*SIZE, 3), dtype=np.uint8))
    pixels = 0
    for i in range(5):
        found = render(SIZE, 7, i)
        red = found.image[..., 0].astype(int)
        corners = [red[y::2, x::2] for y in (0, 1) for x in (0, 1)]
        total = np.zeros(SIZE, dtype=int)
        for one in found.objects:
            if one.type == "DontCare" and not one.mask.any():
                continue  # an object of which another hides all but a part of a pixel
            assert one.mask.any() and one.mask.shape == SIZE
            if one.mask.sum() > 4:  # of a speck the samples of others are more
                owner = np.bincount(np.stack(corners)[:, one.mask].ravel())[1:].argmax() + 1
                count = sum(corner == owner for corner in corners)
                assert (count[one.mask] >= 2).all() and one.mask[count > 2].all()
            total += one.mask
            rows, columns = np.nonzero(one.mask)
            x0, y0, x1, y1 = one.box
            assert x0 - 1 <= columns.min() and columns.max() <= x1 + 1
            assert y0 - 1 <= rows.min() and rows.max() <= y1 + 1
        assert total.max() <= 1
        pixels += total.sum()
    assert pixels > 1000


def test_coco_files_have_the_masks_and_kitti_files_have_none(tmp_path: Path) -> None:
    for form in ("kitti", "coco"):
        generate(tmp_path / form, 4, SIZE, 5, form)
    data = open_dataset(f"coco:{tmp_path / 'coco'}:train")
    for i in range(len(data)):
        scene_of = int(data.image_id(i)) - 1
        objects = [o for o in render(SIZE, 5, scene_of).objects if o.type != "DontCare"]
        masks = data.labels_with_masks(i).masks
        assert masks is not None and data.scan_with_masks(i).warnings == []
        for mask, one in zip(masks, objects, strict=True):
            assert np.array_equal(mask.rle(SIZE).pixels(), one.mask)
    with pytest.raises(UserError, match="no mask"):
        open_dataset(f"kitti:{tmp_path / 'kitti'}:train").labels_with_masks(0)
