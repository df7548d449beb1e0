"""Bundles with masks: the fourth output, the sidecar's word on it, and the golden masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.errors import UserError
from detr.mask_scaling import MaskScaling
from engines import open_bundle, open_engine
from engines.base import Engine
from engines.bundle import SIDECAR, Golden
from engines.parity import Parity

MakeBundle = Callable[..., Path]
SIZES = [(40, 60), (31, 48), (16, 90)]


def pictures() -> list[Any]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 255, (*size, 3)).astype(np.uint8) for size in SIZES]


def change(folder: Path, **changes: Any) -> None:
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps(sidecar | changes))


@pytest.mark.parametrize("batch", ["dynamic", 4])
@pytest.mark.parametrize("name", ["native", "openvino", "half"])
def test_engines_agree(toy_bundle: MakeBundle, name: str, batch: Any) -> None:
    folder = toy_bundle(batch=batch, masks=True)
    reference, engine = open_engine(folder, "onnxruntime"), open_engine(folder, name)
    inputs = reference.prepare(pictures())
    wanted, found = reference.run(inputs), engine.run(inputs)
    assert wanted.masks is not None and found.masks is not None
    assert found.masks.logits.shape == (3, 5, 8, 12)
    np.testing.assert_allclose(found.masks.logits, wanted.masks.logits, atol=1e-3)
    for size, one in zip(SIZES, engine.finish(found), strict=True):
        assert one.masks is not None and {mask.size for mask in one.masks} == {size}


def test_values_within_the_graph(toy_bundle: MakeBundle) -> None:
    folder = toy_bundle(masks=True)
    names = ["tokens", "masks_flat", "masks", "boxes"]
    found = {}
    for name in ("onnxruntime", "native", "openvino"):
        engine = open_engine(folder, name)
        values = engine.intermediates(engine.prepare(pictures()), names)
        assert values is not None and list(values) == names[:2]
        found[name] = values["masks_flat"]
    np.testing.assert_allclose(found["native"], found["onnxruntime"], atol=1e-3)
    np.testing.assert_allclose(found["openvino"], found["onnxruntime"], atol=1e-3)


def areas(engine: Engine) -> int:
    (found,) = engine(pictures()[:1])
    assert found.masks is not None
    return sum(mask.area for mask in found.masks)


def test_engines_read_what_the_sidecar_says(toy_bundle: MakeBundle) -> None:
    folder = toy_bundle(masks=True)
    usual = open_bundle(folder).info
    before = areas(open_engine(folder, "onnxruntime"))
    for changed in ({"threshold": 0.9}, {"margin": 0.0}):
        change(folder, masks=MaskScaling(**changed).model_dump())
        info = open_bundle(folder).info
        assert info.fingerprint != usual.fingerprint, "a verdict must not outlive it"
        for name in ("onnxruntime", "native", "openvino"):
            assert 0 < areas(open_engine(folder, name)) < before


def test_masks_are_not_enlarged_twice(
    toy_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(toy_bundle(masks=True), "onnxruntime")
    raw = engine.run(engine.prepare(pictures()[:1]))
    masks = raw.enlarged()
    monkeypatch.setattr("engines.base.image_masks", None)
    (found,) = engine.finish(raw, masks)
    assert masks is not None and found.masks == masks[0]


def test_golden_masks_come_back(toy_bundle: MakeBundle) -> None:
    folder = toy_bundle(masks=True)
    images = pictures()
    found = open_engine(folder, "onnxruntime")(images)
    empty = replace(found[0].take(np.zeros(0, np.int64)), masks=())
    golden = Golden([*images, images[0]], [*found, empty])
    (folder / "golden.npz").write_bytes(golden.to_bytes())
    back = open_bundle_unchecked(folder).golden()
    assert [one.masks for one in back.detections] == [one.masks for one in golden.detections]


def open_bundle_unchecked(folder: Path) -> Any:
    from detr.files import sha256

    sidecar = json.loads((folder / SIDECAR).read_text())
    change(folder, files=sidecar["files"] | {"golden.npz": sha256(folder / "golden.npz")})
    return open_bundle(folder)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"masks": None}, "outputs are boxes, scores, labels without masks"),
        ({"outputs": ["boxes", "scores", "labels"]}, "outputs are boxes, scores, labels, masks"),
        ({"masks": {"threshold": 1.0}}, "masks.threshold"),
        ({"masks": {"enlarge": "nearest"}}, "masks.enlarge"),
        ({"masks": {"treshold": 0.5}}, "treshold"),
    ],
)
def test_a_sidecar_that_contradicts_itself(
    toy_bundle: MakeBundle, changes: dict[str, Any], place: str
) -> None:
    folder = toy_bundle(masks=True)
    change(folder, **changes)
    with pytest.raises(UserError, match=SIDECAR) as caught:
        open_bundle(folder)
    assert caught.value.code == "bundle-sidecar" and place in caught.value.message


def test_bundles_of_boxes_alone_say_nothing_of_masks(toy_bundle: MakeBundle) -> None:
    info = open_bundle(toy_bundle()).info
    told = info.model_copy(update={"parity": Parity(matched=3)}).model_dump_json()
    assert "mask_iou" not in told and '"masks":null' in told, "the detector's own"
    assert told.count("mask") == 1
