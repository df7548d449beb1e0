"""An exported graph answers like the torch model and keeps its promises about its form."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from detr.data import open_dataset
from detr.errors import UserError
from detr.types import Detections
from engines import open_engine
from engines.bundle import Bundle, open_bundle
from engines.evidence import read_evidence
from engines.parity import Budget
from export import bundle as onnx_export
from export.bundle import export_bundle
from export.cli import main
from export.parity.compare import compare_detections

MakeCheckpoint = Callable[..., Path]
# Every detector, opset, lowering and kind of batch at least once.
CASES = {
    "deformable": (17, 1, "gridsample"),
    "deformable-refine": (18, 3, "gridsample"),
    "deformable-two-stage": (17, "dynamic", "gather"),
    "dino": (17, "dynamic", "gridsample"),
    "dino-no-encoder": (18, 1, "gather"),
}


@pytest.fixture(scope="module", params=CASES)
def bundle(
    request: pytest.FixtureRequest,
    checkpoint: MakeCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Bundle, Path]:
    source = checkpoint(request.param)
    out = tmp_path_factory.mktemp("bundles") / f"{request.param}.bundle"
    opset, batch, lowering = CASES[request.param]
    options = ["--opset", opset, "--batch", batch, "--lowering", lowering, "--json"]
    arguments = [str(x) for x in ["onnx", source, "--out", out, *options]]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "bundle.json").read_text())
    return open_bundle(out), source


@pytest.mark.slow
def test_graph_form(bundle: tuple[Bundle, Path]) -> None:
    info, config = bundle[0].info, bundle[0].info.model.detector
    model = onnx.load(str(bundle[0].model))
    used = Counter(node.op_type for node in model.graph.node)
    layers = config.encoder.layers + config.decoder.layers
    assert used["MSDeformAttn"] == layers
    norms = 2 * config.encoder.layers + 3 * config.decoder.layers
    assert used["LayerNormalization"] >= norms, "a norm was split into arithmetic"
    assert not set(used) & {"Loop", "If", "Scan", "ScatterND", "NonZero", "SequenceAt"}
    assert [f.name for f in model.functions] == ["MSDeformAttn"]
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions == {"": info.opset, "detr": 1}
    assert [value.name for value in model.graph.input] == list(info.inputs)
    assert [value.name for value in model.graph.output] == list(info.outputs)
    dim = model.graph.input[0].type.tensor_type.shape.dim
    assert (dim[0].dim_param or dim[0].dim_value) == (
        "batch" if info.batch == "dynamic" else info.batch
    )
    assert [d.dim_value for d in dim[1:]] == [3, 64, 96]
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def test_the_file_says_nothing_about_the_machine(bundle: tuple[Bundle, Path]) -> None:
    content = bundle[0].model.read_bytes()
    assert b"site-packages" not in content and str(Path.home()).encode() + b"/" not in content


def test_sidecar_records_the_proof(bundle: tuple[Bundle, Path]) -> None:
    info = bundle[0].info
    assert info.parity is not None and info.parity.matched >= 40
    assert info.parity.max_box_px <= 0.5 and info.parity.max_score <= 1e-3
    assert info.reference_ap == 0.25
    assert len(bundle[0].golden().images) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "native"])
def test_engines_find_what_torch_finds(bundle: tuple[Bundle, Path], name: str) -> None:
    generator = np.random.default_rng(5)
    images = [
        generator.integers(0, 255, (*size, 3)).astype(np.uint8)
        for size in [(64, 96), (90, 60), (33, 200)]
    ]
    reference = open_engine(bundle[0].path, "torch")
    assert reference.artifact.samefile(bundle[1])
    engine = open_engine(bundle[0].path, name)
    expected = [found for image in images for found in reference([image])]
    for size in (1, 3) if engine.batch_size is None else (engine.batch_size,):
        found: list[Detections] = []
        for start in range(0, 3, size):
            found += engine(images[start : start + size])
        parity = compare_detections(expected, found, Budget(best=20))
        # Tighter than the budget: these are equal computations on equal numbers.
        assert parity.violations(Budget(box_px=0.02, score=1e-5)) == []
        assert parity.matched >= 30


@pytest.mark.slow
def test_real_images(bundle: tuple[Bundle, Path], shared_data: Path) -> None:
    data = open_dataset(f"kitti:{shared_data / 'kitti_tiny'}")
    images = [data.image(i) for i in range(20)]
    reference, engine = open_engine(bundle[1]), open_engine(bundle[0].path, "onnxruntime")
    size = engine.batch_size or 4
    expected, found = (
        [x for start in range(0, 20, size) for x in one(images[start : start + size])]
        for one in (reference, engine)
    )
    assert [len(x.above(0.3)) for x in expected] == [len(x.above(0.3)) for x in found]
    assert compare_detections(expected, found).violations(Budget()) == []


@pytest.mark.slow
def test_a_wrong_graph_is_not_kept(
    bundle: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(str(bundle[0].model))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("attention.value_proj.bias"):
            wrong = numpy_helper.to_array(tensor) + 0.5
            tensor.CopyFrom(numpy_helper.from_array(wrong.astype(np.float32), tensor.name))
    out = tmp_path / "x.bundle"
    out.mkdir()
    (out / "bundle.json").write_text("the old one")
    monkeypatch.setattr(onnx_export, "export_graph", lambda *_: model)
    with pytest.raises(UserError) as caught:
        export_bundle(bundle[1], out, batch=bundle[0].info.batch)
    assert caught.value.code == "export-parity"
    assert "\n" not in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bundle", "x.rejected.bundle"]
    assert (out / "bundle.json").read_text() == "the old one"
    rejected = tmp_path / "x.rejected.bundle"
    assert open_bundle(rejected).info.parity is not None
    evidence = read_evidence(rejected)
    assert evidence.status == "rejected" and evidence.reasons
    assert "value_proj" in caught.value.message and caught.value.exit_status == 3


def test_a_full_disk_costs_nothing(
    bundle: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = onnx.load(str(bundle[0].model))
    monkeypatch.setattr(onnx_export, "export_graph", lambda *_: model)
    monkeypatch.setattr(onnx_export.onnx, "save_model", full)
    with pytest.raises(UserError) as caught:
        export_bundle(bundle[1], tmp_path / "x.bundle", batch=bundle[0].info.batch)
    assert caught.value.code == "disk-full" and "model.onnx" in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(
    bundle: tuple[Bundle, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(str(bundle[0].model))
    monkeypatch.setattr(onnx_export, "export_graph", lambda *_: model)
    monkeypatch.setattr(onnx_export, "_EMBED_BYTES", 1000)
    result = export_bundle(bundle[1], tmp_path / "x.bundle", batch=bundle[0].info.batch)
    assert "model.onnx.data" in result.info.files
    assert result.model.stat().st_size < bundle[0].model.stat().st_size / 2
    image = np.full((64, 96, 3), 90, np.uint8)
    small, large = (open_engine(b.path, "onnxruntime")([image]) for b in (bundle[0], result))
    np.testing.assert_array_equal(small[0].boxes, large[0].boxes)


def test_something_else_is_not_overwritten(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError) as caught:
        export_bundle(checkpoint("deformable"), tmp_path)
    assert caught.value.code == "output-exists"
    assert (tmp_path / "thesis.txt").exists()
