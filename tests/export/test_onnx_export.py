"""An exported graph answers like the torch model and keeps its promises about its form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from detr import msda
from detr.errors import UserError
from detr.types import Detections
from engines import open_engine
from engines.bundle import Bundle
from export import onnx_export
from export.onnx_export import export_bundle
from export.parity import Budget, compare

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
    return export_bundle(source, out, *CASES[request.param]), source


def test_graph_form(bundle: tuple[Bundle, Path]) -> None:
    info, config = bundle[0].info, bundle[0].info.model.detector
    model = onnx.load(str(bundle[0].model))
    used = Counter(node.op_type for node in model.graph.node)
    layers = config.encoder_layers + config.decoder_layers
    assert used["MSDeformAttn"] == layers
    norms = 2 * config.encoder_layers + 3 * config.decoder_layers
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
    assert info.parity is not None and info.parity["matched"] >= 40
    assert info.parity["max_box_px"] <= 0.5 and info.parity["max_score"] <= 1e-3
    assert info.reference_ap == 0.25
    assert len(bundle[0].golden().images) == 4


@pytest.mark.parametrize("name", ["onnxruntime", "native"])
def test_engines_find_what_torch_finds(bundle: tuple[Bundle, Path], name: str) -> None:
    if name == "native" and not msda.native_available():
        pytest.skip("kernel not compiled")
    generator = np.random.default_rng(5)
    images = [
        generator.integers(0, 255, (*size, 3)).astype(np.uint8)
        for size in [(64, 96), (90, 60), (33, 200)]
    ]
    reference = open_engine(bundle[0].path, "torch")
    assert reference.artefact.samefile(bundle[1])
    engine = open_engine(bundle[0].path, name)
    expected = [found for image in images for found in reference([image])]
    for size in (1, 3) if engine.batch_size is None else (engine.batch_size,):
        found: list[Detections] = []
        for start in range(0, 3, size):
            found += engine(images[start : start + size])
        parity = compare(expected, found, at_least=20)
        # Tighter than the budget: these are equal computations on equal numbers.
        assert parity.over(Budget(box_px=0.02, score=1e-5)) == []
        assert parity.matched >= 30


def test_a_wrong_graph_is_not_kept(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_graph = onnx_export.export_graph

    def half_pixel_off(*args: object) -> onnx.ModelProto:
        model = export_graph(*args)  # type: ignore[arg-type]
        for node in model.functions[0].node:
            for attribute in node.attribute:
                if attribute.name == "align_corners":
                    attribute.i = 1
        return model

    out = tmp_path / "x.bundle"
    out.mkdir()
    (out / "bundle.json").write_text("the old one")
    monkeypatch.setattr(onnx_export, "export_graph", half_pixel_off)
    with pytest.raises(UserError) as caught:
        export_bundle(checkpoint("deformable"), out)
    assert caught.value.code == "export-parity"
    assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["x.bundle"]
    assert (out / "bundle.json").read_text() == "the old one"


def test_something_else_is_not_overwritten(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError) as caught:
        export_bundle(checkpoint("deformable"), tmp_path)
    assert caught.value.code == "output-exists"
    assert (tmp_path / "thesis.txt").exists()
