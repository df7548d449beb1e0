"""A model at the papers' sizes: two bundles that together answer for both orientations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from bench.run import benchmark
from detr.data.preprocess import PreprocessConfig
from detr.data.synth.scene import render
from detr.errors import UserError
from detr.models import load_model, save_model
from detr.types import ImageArray
from engines import open_bundle, open_engine
from engines.bundle import ORIENTATIONS, SIDECAR
from engines.oriented import OrientedEngine
from export.bundle import RejectedExport
from export.cli import main
from export.oriented import export_bundles
from tests.export.conftest import MakeCheckpoint

PAPERS = PreprocessConfig(short=64, long=96)


@pytest.fixture(scope="module")
def source(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector, info = load_model(checkpoint("dino"))
    path = tmp_path_factory.mktemp("papers") / "model.safetensors"
    save_model(path, detector, info.model_copy(update={"preprocess": PAPERS}))
    return path


@pytest.fixture(scope="module")
def pair(source: Path) -> Path:
    out = source.with_name("student.bundle")
    arguments = ["onnx", str(source), "--out", str(out), "--batch", "2", "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert list(told) == list(ORIENTATIONS)
    assert [told[name]["model"]["preprocess"]["size"] for name in told] == [[64, 96], [96, 64]]
    return out


def scenes() -> list[ImageArray]:
    """Images in turns landscape and portrait, of which the first two fill their canvas."""
    sizes = [(64, 96), (96, 64), (75, 80), (90, 64), (64, 64), (200, 40)]
    return [render(size, 0, i).image for i, size in enumerate(sizes)]


@pytest.mark.parametrize("name", ["onnxruntime", "native", "openvino", "half", "torch", None])
def test_every_engine_answers_for_both_orientations(
    pair: Path, source: Path, name: str | None
) -> None:
    engine = open_engine(pair, name)
    assert isinstance(engine, OrientedEngine) and len(engine.artifacts) == 2
    images = scenes()
    together = engine([images[0], images[1]])
    reference = open_engine(source)
    for image, found in zip(images, together, strict=False):  # the checkpoint has no padding either
        np.testing.assert_allclose(found.scores, reference([image])[0].scores, atol=2e-4)
        np.testing.assert_allclose(found.boxes, reference([image])[0].boxes, atol=2e-2)
    on_canvas = [reference.on_canvas(size) for size in PAPERS.canvases]
    for start in range(0, len(images), 2):
        for image, found in zip(images[start:], engine(images[start : start + 2]), strict=False):
            expected = on_canvas[image.shape[0] > image.shape[1]]([image])[0]
            np.testing.assert_allclose(found.scores, expected.scores, atol=2e-4)
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-2)


def test_what_takes_one_bundle_says_which_there_are(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"landscape.*student\.bundle/portrait\.bundle") as caught:
        open_bundle(pair)
    assert caught.value.code == "bundle-orientation"
    for words in (["cpp", "--out", "x"], ["triton", "--out", "x"], ["trt"]):
        result = CliRunner().invoke(main, [words[0], str(pair), *words[1:]])
        assert result.exit_code == 2 and "[bundle-orientation]" in result.output, result.output
    result = CliRunner().invoke(
        main, ["cpp", str(pair / ORIENTATIONS[1]), "--out", str(tmp_path / "x")]
    )
    assert result.exit_code == 0, result.output
    assert "kHeight = 96" in (tmp_path / "x" / "model_info.hpp").read_text()


def test_orientations_are_not_mixed_within_a_canvas(pair: Path) -> None:
    engine = open_engine(pair, "onnxruntime")
    with pytest.raises(UserError) as caught:
        engine.prepare(scenes()[:2])
    assert caught.value.code == "image-orientations"


def test_two_bundles_of_different_models_are_not_one(pair: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bundle"
    shutil.copytree(pair, other)
    sidecar = other / ORIENTATIONS[1] / SIDECAR
    sidecar.write_text(sidecar.read_text().replace('"sha256": "', '"sha256": "f', 1))
    with pytest.raises(UserError) as caught:
        open_engine(other, "onnxruntime")
    assert caught.value.code == "bundle-orientations"


def test_verify_judges_each_on_images_of_its_orientation(pair: Path, landscapes: str) -> None:
    result = CliRunner().invoke(main, ["verify", str(pair), "--data", landscapes, "--json"])
    told = json.loads(result.stdout)
    assert list(told) == list(ORIENTATIONS)
    samples = [told[name]["engines"][0]["samples"] for name in ORIENTATIONS]
    assert samples[0].startswith("2 images of coco:") and samples[1] == "4 golden images"
    assert "no image of its orientation" in result.stderr


@pytest.fixture(scope="module")
def landscapes(pair: Path) -> str:
    """Two landscape images with a box each."""
    classes = open_bundle(pair / ORIENTATIONS[0]).info.model.classes
    folder = pair.with_name("landscapes")
    (folder / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for i in (1, 2):
        Image.fromarray(render((64, 96), 0, i).image).save(folder / "val" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": classes.category_ids[0],
             "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0}
            for i in (1, 2)
        ],
        "categories": [
            {"id": i, "name": name}
            for i, name in zip(classes.category_ids, classes.names, strict=True)
        ],
    }  # fmt: skip
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return f"coco:{folder}:val"


def test_a_report_speaks_of_both_files(pair: Path, landscapes: str) -> None:
    (row,) = benchmark([pair], landscapes, "onnxruntime", iterations=1).rows
    sizes = [(pair / name / "model.onnx").stat().st_size for name in ORIENTATIONS]
    assert row.size_mb == sum(sizes) / 1e6 and row.parity in ("accepted", "undecided")
    hashes = {open_bundle(pair / name).info.files["model.onnx"] for name in ORIENTATIONS}
    assert len(row.sha256) == 64 and row.sha256 not in hashes


def test_a_rejected_one_keeps_the_pair_from_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import bundle as module

    def failing(bundle: object, torch_engine: object, golden: object, out: Path) -> None:
        kept = out.with_name("kept.rejected.bundle")
        bundle.path.rename(kept)  # type: ignore[attr-defined]
        verdict = type("Verdict", (), {"complaint": lambda self: "nothing is found"})()
        raise RejectedExport(module.Bundle(kept, bundle.info), verdict, out)  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr(module, "_pass_gate", failing)
    with pytest.raises(RejectedExport, match="nothing is found"):
        export_bundles(source, tmp_path / "x.bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.rejected.bundle"]
    assert (tmp_path / "x.rejected.bundle" / "model.onnx").exists()


def test_a_square_size_needs_one_bundle_only(source: Path, tmp_path: Path) -> None:
    detector, info = load_model(source)
    square = info.model_copy(update={"preprocess": PreprocessConfig(short=64, long=64)})
    save_model(tmp_path / "model.safetensors", detector, square)
    (bundle,) = export_bundles(tmp_path / "model.safetensors", tmp_path / "x.bundle", gate=False)
    assert bundle.path == tmp_path / "x.bundle" and bundle.info.model.preprocess.size == (64, 64)
