"""Files of any content: a UserError in one line or an answer, never a traceback.

See :mod:`tests.fuzzing` for the number of inputs. Labels have tests of their own in
``tests/data/test_fuzz.py``, values of recipes in ``tests/distill/test_recipe_values.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bench.score import score
from detr.config import ClassMap, DetectorConfig
from detr.data import Dataset, inspect, open_dataset
from detr.data.check import check
from detr.data.images import read_header, read_image
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.masks import encode
from detr.model_info import ModelInfo, read_model_info
from detr.models.tensors import match_tensors, read_tensors
from distill.recipe import load_recipe, shipped
from engines.bundle import GOLDEN, MODEL, SIDECAR, BundleInfo, open_bundle
from tests.fuzzing import FUZZ, changed, row_of, spoilt

SIZE = (100, 60)
ROW = ["Car", "-1", "-1", "-10", "10", "20", "30.5", "40", *["-1"] * 3, *["-1000"] * 3, "-10", ".9"]


def answer(work: Callable[[], Any]) -> Any:
    """What comes out, or None for a mistake that is told in one line."""
    try:
        return work()
    except UserError as error:
        assert "\n" not in error.message
        return None


def text_of(document: Any) -> str:
    return json.dumps(document)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def labeled(folder: Path) -> Dataset:
    """Two images, three objects; as KITTI, so that both protocols can score."""
    for place in ("training/image_2", "training/label_2", "results"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.new("RGB", SIZE).save(folder / f"training/image_2/00000{number}.png")
        row = "Car 0 0 0 10 20 30 40 1.5 1.6 3.9 0 1.6 20 0\n"
        (folder / f"training/label_2/00000{number}.txt").write_text(row * (number + 1))
    return open_dataset(f"kitti:{folder}")


INFO = ModelInfo(
    detector=DetectorConfig(num_classes=2, width=32, attention_heads=2),
    classes=ClassMap(names=("a", "b"), category_ids=(1, 2)),
    preprocess=PreprocessConfig(size=(32, 64)),
)


@FUZZ
@given(draw=st.data())
def test_model_json(folder: Path, draw: st.DataObject) -> None:
    path = folder / "model.json"
    document = changed(json.loads(INFO.model_dump_json()), draw)
    path.write_bytes(spoilt(text_of(document).encode(), draw) if draw.draw(st.booleans()) else
                     text_of(document).encode())  # fmt: skip
    info = answer(lambda: read_model_info(path))
    assert info is None or ModelInfo.model_validate_json(info.model_dump_json()) == info


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """A bundle of a graph that does nothing."""
    place = folder / "x.bundle"
    place.mkdir()
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "empty", [value], [value])
    (place / MODEL).write_bytes(onnx.helper.make_model(graph).SerializeToString())
    buffer = io.BytesIO()
    np.savez(buffer, image_0=np.zeros((2, 2, 3), np.uint8))
    (place / GOLDEN).write_bytes(buffer.getvalue())
    files = {n: hashlib.sha256((place / n).read_bytes()).hexdigest() for n in (MODEL, GOLDEN)}
    source = {"path": "/x.safetensors", "sha256": "0" * 64}
    content = {"model": json.loads(INFO.model_dump_json()), "opset": 17, "lowering": "gather"}
    whole = {**content, "batch": 1, "files": files, "source": source}
    (place / SIDECAR).write_text(BundleInfo.model_validate(whole).model_dump_json())
    return place


@FUZZ
@given(draw=st.data())
def test_bundle_json(bundle: Path, draw: st.DataObject) -> None:
    good = (bundle / SIDECAR).read_bytes()
    assert open_bundle(bundle).info.batch == 1
    try:
        content = text_of(changed(json.loads(good), draw)).encode()
        (bundle / SIDECAR).write_bytes(
            spoilt(content, draw) if draw.draw(st.booleans()) else content
        )
        opened = answer(lambda: open_bundle(bundle))
        assert opened is None or len(opened.info.fingerprint) == 64
    finally:
        (bundle / SIDECAR).write_bytes(good)


@FUZZ
@given(draw=st.data())
def test_bundle_graph(bundle: Path, draw: st.DataObject) -> None:
    """A graph whose hash the sidecar has, too."""
    sidecar, graph = (bundle / SIDECAR).read_bytes(), (bundle / MODEL).read_bytes()
    try:
        content = spoilt(graph, draw)
        (bundle / MODEL).write_bytes(content)
        document = json.loads(sidecar)
        document["files"][MODEL] = hashlib.sha256(content).hexdigest()
        (bundle / SIDECAR).write_text(json.dumps(document))
        answer(lambda: open_bundle(bundle))
    finally:
        (bundle / SIDECAR).write_bytes(sidecar)
        (bundle / MODEL).write_bytes(graph)


HEADER = {
    "__metadata__": {"format": "pt"},
    "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "bias": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]},
}


@FUZZ
@given(draw=st.data())
def test_safetensors(folder: Path, draw: st.DataObject) -> None:
    header = text_of(changed(HEADER, draw)).encode()
    length = draw.draw(st.one_of(st.just(len(header)), st.integers(0, 2**64 - 1)))
    content = struct.pack("<Q", length) + header + bytes(28)
    path = folder / "model.safetensors"
    path.write_bytes(spoilt(content, draw) if draw.draw(st.booleans()) else content)
    tensors = answer(lambda: read_tensors(path))
    if tensors is not None:
        module = nn.Linear(3, 2)
        answer(lambda: match_tensors(module, tensors, str(path)))
        assert module.weight.shape == (2, 3)


def pictures() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "png": (Image.fromarray(noise), {}),
        "jpg": (Image.fromarray(noise), {"exif": exif}),
        "bmp": (Image.fromarray(noise), {}),
        "webp": (Image.fromarray(noise), {}),
        "tif": (Image.fromarray(noise), {"compression": "tiff_lzw"}),
        "16.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 200), {}),
        "float.tif": (Image.fromarray(noise[..., 0].astype(np.float32)), {}),
        "palette.png": (Image.fromarray(noise).convert("P"), {"transparency": 3}),
    }
    found = {}
    for name, (picture, options) in kinds.items():
        buffer = io.BytesIO()
        suffix = name.rpartition(".")[2].replace("jpg", "jpeg").replace("tif", "tiff")
        picture.save(buffer, format=suffix, **options)
        found[name] = buffer.getvalue()
    return found


PICTURES = pictures()


@FUZZ
@given(draw=st.data())
def test_images(folder: Path, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(list(PICTURES)))
    path = folder / f"picture-{name}"
    path.write_bytes(spoilt(PICTURES[name], draw))
    for exif in ("apply", "ignore"):
        image = answer(lambda exif=exif: read_image(path, exif))
        header = answer(lambda: read_header(path))
        if image is not None:
            # Whoever looks at the header alone gets the size that the pixels have.
            assert header is not None and header.size(exif) == image.shape[:2]
            assert header.deep == (image.dtype != np.uint8)


@FUZZ
@given(draw=st.data())
def test_images_in_check_and_training(folder: Path, labeled: Dataset, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(["png", "jpg", "16.png"]))
    place = folder / "training/image_2"
    good = (place / "000000.png").read_bytes()
    try:
        (place / "000000.png").write_bytes(spoilt(PICTURES[name], draw))
        dataset = open_dataset(f"kitti:{folder}")
        before, decoded = inspect(dataset), check(dataset)
        # What stops a training is told by the check, which looks at the pixels as well.
        codes = {error.message for error in before.errors}
        assert codes <= {error.message for error in decoded.errors}
        readable = answer(lambda: dataset.image(0)) is not None
        broken = {"image-unreadable", "image-range"} & {error.code for error in decoded.errors}
        assert readable != bool(broken)
        assert before.objects == decoded.objects
    finally:
        (place / "000000.png").write_bytes(good)


RESULTS = [
    {"image_id": 0, "category_id": 1, "bbox": [10, 20, 20, 20], "score": 0.9},
    {"image_id": 1, "category_id": 1, "bbox": [10, 20, 20, 20], "score": 0.8},
    {"image_id": 1, "category_id": 2, "bbox": [1.5, 2, 3, 4], "score": 0.1},
]


@FUZZ
@given(draw=st.data())
def test_coco_results(folder: Path, labeled: Dataset, draw: st.DataObject) -> None:
    path = folder / "results.json"
    content = text_of(changed(RESULTS, draw)).encode()
    path.write_bytes(spoilt(content, draw) if draw.draw(st.booleans()) else content)
    for protocol in ("coco", "kitti"):
        found = answer(lambda protocol=protocol: score(path, labeled, protocol))
        if found is not None and found.coco is not None:
            assert 0 <= found.coco.ap <= 1 and math.isfinite(found.coco.ap)


MASKED = [
    {**RESULTS[0], "segmentation": {"size": [60, 100], "counts": [1220, 20, 40, 20, 4700]}},
    {**RESULTS[1], "segmentation": [[10, 20, 30, 20, 30, 40]]},
    {**RESULTS[2], "segmentation": encode(np.eye(60, 100, dtype=np.bool_)).to_json()},
]


@FUZZ
@given(draw=st.data())
def test_masks_of_results(folder: Path, draw: st.DataObject) -> None:
    labels, path = folder / "masks.json", folder / "results.json"
    row = {"category_id": 1, "bbox": [10, 20, 20, 20], "segmentation": MASKED[1]["segmentation"]}
    document = {
        "images": [
            {"id": k, "file_name": f"{k}.png", "width": SIZE[0], "height": SIZE[1]} for k in (0, 1)
        ],
        "annotations": [{**row, "id": k + 1, "image_id": k} for k in (0, 1)],
        "categories": [{"id": k, "name": "ab"[k - 1]} for k in (1, 2)],
    }
    labels.write_text(text_of(document))
    path.write_text(text_of(changed(MASKED, draw)))
    found = answer(lambda: score(path, open_dataset(f"coco:{labels}")))
    if found is not None and found.masks is not None:
        assert 0 <= found.masks.ap <= 1 and math.isfinite(found.masks.ap)


@FUZZ
@given(draw=st.data())
def test_kitti_results(folder: Path, labeled: Dataset, draw: st.DataObject) -> None:
    for number in range(2):
        rows = [row_of(draw, ROW, ["Van", "DontCare", "cow"]) for _ in range(2)]
        path = folder / f"results/00000{number}.txt"
        path.write_text("\n".join(rows), encoding="utf-8", errors="replace")
    for protocol in ("coco", "kitti"):
        answer(lambda protocol=protocol: score(folder / "results", labeled, protocol))


@FUZZ
@given(draw=st.data())
def test_recipes(folder: Path, draw: st.DataObject) -> None:
    path = folder / "recipe.yaml"
    name = draw.draw(st.sampled_from(["demo-teacher", "demo-student", "kitti-dino-r18"]))
    path.write_bytes(spoilt(shipped()[name].read_bytes(), draw))
    recipe = answer(lambda: load_recipe(path))
    if recipe is not None:
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe


DATA = {
    "format": "kitti", "path": ".", "split": None, "classes": {"Car": ["Car", "Van"]},
    "ignore": ["Truck"], "exif": "apply", "range": None, "drop": ["box-outside"],
}  # fmt: skip


@FUZZ
@given(draw=st.data())
def test_data_yaml(folder: Path, labeled: Dataset, draw: st.DataObject) -> None:
    path = folder / "data.yaml"
    content = yaml.safe_dump(changed(DATA, draw), allow_unicode=True).encode()
    path.write_bytes(spoilt(content, draw) if draw.draw(st.booleans()) else content)
    dataset = answer(lambda: open_dataset(str(path)))
    if dataset is not None:
        found = answer(lambda: inspect(dataset))
        assert found is None or found.images == len(dataset)
