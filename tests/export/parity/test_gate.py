"""``export verify`` as typed, on a small hand-made bundle, and where it can say little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from bench.artifact import parity_status
from detr.config import ClassMap, DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.data.synth.write import generate
from detr.errors import GateError, UserError
from detr.files import sha256
from detr.model_info import ModelInfo
from detr.types import Detections
from engines.bundle import GOLDEN, MODEL, SIDECAR, BundleInfo, Golden, Source, open_bundle
from engines.evidence import graph_evidence, read_evidence
from engines.open import open_engine
from engines.parity import Budget
from export.cli import main
from export.parity.budget import default_budget, read_budget
from export.parity.gate import gate_bundle

SIZE = (32, 64)
ROWS = 12


def model(scores: float, bias: float) -> onnx.ModelProto:
    """Boxes drift with the image's brightness; every score is ``scores``."""

    def value(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["batch", *shape])

    grid = np.arange(ROWS, dtype=np.float32)[:, None] * 2
    base = np.concatenate([grid, grid, grid + 9, grid + 7], 1)[None] + bias
    constants = {
        "base": base,
        "score": np.full((1, ROWS), scores, np.float32),
        "label": np.arange(ROWS, dtype=np.int64)[None] % 2,
    }
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["drift"]),
        helper.make_node("Reshape", ["mean", "row"], ["drift_row"]),
        helper.make_node("Add", ["base", "drift"], ["boxes"]),
        helper.make_node("Mul", ["drift_row", "zero"], ["nothing"]),
        helper.make_node("Add", ["score", "nothing"], ["scores"]),
        helper.make_node("Cast", ["nothing"], ["no_class"], to=TensorProto.INT64),
        helper.make_node("Add", ["label", "no_class"], ["labels"]),
        helper.make_node("Add", ["valid_sizes", "original_sizes"], ["unused"]),
    ]
    constants |= {
        "column": np.array([-1, 1, 1]),
        "row": np.array([-1, 1]),
        "zero": np.zeros(1, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "toy",
        [value("images", 3, *SIZE), value("valid_sizes", 2), value("original_sizes", 2)],
        [
            value("boxes", ROWS, 4),
            value("scores", ROWS),
            value("labels", ROWS, kind=TensorProto.INT64),
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def expected(image: np.ndarray, scores: float) -> Detections:
    config = PreprocessConfig(size=SIZE)
    from detr.data.preprocess import preprocess

    drift = preprocess([image], config).images.mean()
    grid = np.arange(ROWS, dtype=np.float32)[:, None] * 2
    boxes = (np.concatenate([grid, grid, grid + 9, grid + 7], 1) + drift).astype(np.float32)
    return Detections(boxes, np.full(ROWS, scores, np.float32), np.arange(ROWS, dtype=np.int64) % 2)


MakeBundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path) -> MakeBundle:
    """A bundle whose checkpoint is gone, as on a target: its golden detections are all there is."""

    def make(scores: float = 0.9, bias: float = 0.0) -> Path:
        folder = tmp_path / "toy.bundle"
        folder.mkdir(exist_ok=True)
        onnx.save(model(scores, bias), str(folder / MODEL))
        generator = np.random.default_rng(0)
        images = [
            generator.integers(0, 255, (*shape, 3)).astype(np.uint8)
            for shape in ((32, 64), (20, 64), (64, 64))
        ]
        golden = Golden(images, [expected(image, scores) for image in images])
        (folder / GOLDEN).write_bytes(golden.to_bytes())
        info = BundleInfo(
            model=ModelInfo(
                detector=DetectorConfig(num_classes=2),
                classes=ClassMap(names=("Car", "Van"), category_ids=(1, 2)),
                preprocess=PreprocessConfig(size=SIZE),
            ),
            opset=17,
            lowering="gridsample",
            batch="dynamic",
            files={name: sha256(folder / name) for name in (MODEL, GOLDEN)},
            source=Source(path=str(tmp_path / "gone.safetensors"), sha256="0" * 64),
        )
        (folder / SIDECAR).write_text(info.model_dump_json())
        return folder

    return make


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_accepted_without_torch(bundle: MakeBundle) -> None:
    path = bundle()
    result = call(path, "--json")
    assert result.exit_code == 0, result.output
    verdict = json.loads(result.stdout)["engines"][0]
    assert (verdict["reference"], verdict["status"]) == ("golden", "accepted")
    assert verdict["parity"]["matched"] == 3 * ROWS
    assert "is gone" in verdict["notes"][0]
    evidence = read_evidence(path)
    assert (evidence.status, evidence.reasons) == ("accepted", ())
    assert evidence.sha256 == sha256(path / MODEL)
    assert "mask_iou" not in (path / "evidence.json").read_text(), "it finds boxes alone"


def test_rejected_with_status_3_and_evidence(bundle: MakeBundle, tmp_path: Path) -> None:
    path = bundle(bias=1.0)
    result = call(path, "--draw", tmp_path / "pictures")
    assert result.exit_code == 3
    assert result.stderr.startswith("error[parity-rejected]") and result.stderr.count("\n") == 1
    assert "golden image 0" in result.stderr and "1 px" in result.stderr
    evidence = read_evidence(path)
    assert evidence.status == "rejected"
    assert any(reason.startswith("onnxruntime: ") for reason in evidence.reasons)
    assert [p.suffix for p in (tmp_path / "pictures").iterdir()] == [".png"]
    # A wider budget accepts it, and the evidence says so.
    budget = tmp_path / "wide.yaml"
    budget.write_text("box_px: 2\nbox_px_median: 2\n")
    assert call(path, "--budget", budget).exit_code == 0
    assert read_evidence(path).status == "accepted"


def test_nothing_found_is_undecided(bundle: MakeBundle) -> None:
    path = bundle(scores=0.01)
    result = call(path)
    assert result.exit_code == 3
    assert result.stderr.startswith("error[parity-undecided]")
    assert "too few detections to judge" in result.stderr
    assert read_evidence(path).status == "unverified"


def test_not_a_number_is_rejected(bundle: MakeBundle) -> None:
    path = bundle()
    graph = onnx.load(str(path / MODEL))
    for tensor in graph.graph.initializer:
        if tensor.name == "base":
            broken = numpy_helper.to_array(tensor).copy()
            broken[0, 3] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(broken, "base"))
    reseal(path, graph)
    with pytest.raises(GateError, match="no numbers") as caught:
        gate_bundle(open_bundle(path)).check()
    assert caught.value.code == "parity-rejected"


def test_a_graph_that_fails_is_a_rejection_and_no_traceback(bundle: MakeBundle) -> None:
    path = bundle()
    graph = onnx.load(str(path / MODEL))
    for tensor in graph.graph.initializer:
        if tensor.name == "column":
            tensor.CopyFrom(numpy_helper.from_array(np.array([1, 1, 1]), "column"))
    reseal(path, graph)
    verdict = gate_bundle(open_bundle(path)).engines[0]
    assert verdict.status == "rejected" and "batch 2" in verdict.reasons[0]
    assert verdict.pitfall is not None and verdict.pitfall.id == "frozen-batch"
    (path / MODEL).write_bytes(b"")
    reseal(path, onnx.ModelProto())
    verdict = gate_bundle(open_bundle(path)).engines[0]
    assert verdict.status == "rejected" and "does not load" in verdict.reasons[0]


def test_torch_is_no_candidate(bundle: MakeBundle) -> None:
    result = call(bundle(), "--engine", "torch")
    assert result.exit_code == 2 and result.stderr.startswith("error[verify-torch]")


def test_a_rejection_is_kept_whatever_its_explanation_comes_to(
    bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted once, wrong now; neither a failing search nor a full disk must leave it accepted."""
    path = bundle()
    generate(tmp_path / "data", 4, SIZE, seed=0, val_fraction=0.5)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("export.parity.engines.input_symptoms", fail)
    monkeypatch.setattr("engines.native_engine.NativeEngine.finish", lambda *_: [nothing()] * 1)
    (tmp_path / "pictures").touch()
    result = call(
        path, "--engine", "native", "--data", f"kitti:{tmp_path / 'data'}", "--json",
        "--draw", tmp_path / "pictures" / "below-a-file",
    )  # fmt: skip
    assert result.exit_code == 3, result.output
    notes = json.loads(result.stdout)["engines"][-1]["notes"]
    assert any("out of memory" in note for note in notes), notes
    assert any("no picture" in note for note in notes), notes
    assert read_evidence(path).status == "rejected"
    with pytest.warns(UserWarning, match="the parity gate rejected it in native"):
        open_engine(path, "native")


def nothing() -> Detections:
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def test_an_engine_that_does_not_load_is_rejected(
    bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("not implemented: Foo")

    monkeypatch.setattr("engines.native_engine.NativeEngine.__init__", fail)
    path = bundle()
    result = call(path, "--engine", "native")
    assert result.exit_code == 3 and "does not load: not implemented: Foo" in result.stderr
    evidence = read_evidence(path)
    assert evidence.status == "rejected" and evidence.verdicts["onnxruntime"].status == "accepted"


def test_labels_of_no_class_are_rejected(bundle: MakeBundle, tmp_path: Path) -> None:
    path = bundle()
    graph = onnx.load(str(path / MODEL))
    for tensor in graph.graph.initializer:
        if tensor.name == "label":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, "label"))
    reseal(path, graph)
    result = call(path, "--draw", tmp_path / "pictures")
    assert result.exit_code == 3 and "detections of no class (there are 2)" in result.stderr
    assert list((tmp_path / "pictures").iterdir())


def test_a_verdict_does_not_outlive_the_classes_or_the_preprocessing(bundle: MakeBundle) -> None:
    path = bundle()
    gate_bundle(open_bundle(path))
    assert graph_evidence(open_bundle(path)) is not None
    for change in (
        {"classes": {"names": ["Van", "Car"], "category_ids": [1, 2]}},
        {"preprocess": {"size": list(SIZE), "mean": [0, 0, 0]}},
    ):
        sidecar = json.loads((path / SIDECAR).read_text())
        sidecar["model"] |= change
        (path / SIDECAR).write_text(json.dumps(sidecar))
        assert graph_evidence(open_bundle(path)) is None
        assert parity_status(path / MODEL, "onnxruntime") is None


@pytest.mark.parametrize("command", ["trt", "triton", "cpp"])
def test_nothing_is_made_of_a_rejected_graph(
    bundle: MakeBundle, tmp_path: Path, command: str
) -> None:
    path = bundle(bias=1.0)
    assert call(path).exit_code == 3
    out = [] if command == "trt" else ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [command, str(path), *out])
    assert result.exit_code == 3 and result.stderr.startswith("error[bundle-rejected]")
    assert not (tmp_path / "out").exists() and not (path / "engines").exists()


def test_a_wider_budget_is_told(bundle: MakeBundle, tmp_path: Path) -> None:
    budget = tmp_path / "wide.yaml"
    budget.write_text("box_px: 2\nscore: 0.001\ndetections: 3\n")
    notes = json.loads(call(bundle(), "--budget", budget, "--json").stdout)["engines"][0]["notes"]
    assert notes[-1] == (
        "by a budget wider than the usual one: detections 3 (usually 10), box_px 2 (usually 0.5)"
    )


def test_other_classes_are_compared_without_ap(bundle: MakeBundle, tmp_path: Path) -> None:
    generate(tmp_path / "data", 4, SIZE, seed=0, val_fraction=0.5)
    data = f"kitti:{tmp_path / 'data'}"
    # The toy knows cars and vans; the data pedestrians, too. ONNX Runtime is the reference.
    result = gate_bundle(open_bundle(bundle()), data, ["native"], images=2)
    last = result.engines[-1]
    assert (last.reference, last.status) == ("onnxruntime", "accepted")
    assert last.ap is None and "AP was not compared" in last.notes[0]


def reseal(path: Path, graph: onnx.ModelProto) -> None:
    """Writes another graph into a bundle as its exporter would have."""
    onnx.save(graph, str(path / MODEL))
    info = BundleInfo.model_validate_json((path / SIDECAR).read_bytes())
    files = info.files | {MODEL: sha256(path / MODEL)}
    (path / SIDECAR).write_text(info.model_copy(update={"files": files}).model_dump_json())


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        ("box_pix: 1", "budget-key", "did you mean box_px?"),
        ("zzz: 1", "budget-key", "known: threshold"),
        ("missing: 2", "budget-value", "missing"),
        ("detections: 0", "budget-value", "detections"),  # nothing found would be enough
        ("ap: .nan", "budget-value", "ap"),
        ("- 1", "budget-file", "mapping"),
        ("{", "budget-file", "neither YAML nor JSON"),
    ],
)
def test_bad_budgets(tmp_path: Path, content: str, code: str, told: str) -> None:
    path = tmp_path / "budget.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_budget(path, "fp32")
    assert caught.value.code == code and told in caught.value.message
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_a_budget_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_text('{"ap": 0.1}')
    assert read_budget(path, "fp16") == default_budget("fp16").model_copy(update={"ap": 0.1})
    with pytest.raises(UserError, match="budget-file"):
        read_budget(tmp_path / "none.yaml", "fp32")


def test_lower_precision_is_allowed_more() -> None:
    rows: list[dict[str, Any]] = [
        default_budget(precision).model_dump() for precision in ("fp32", "fp16", "int8")
    ]
    for name in set(Budget.model_fields) - {"threshold", "best", "detections"}:
        figures = [row[name] if "iou" not in name else -row[name] for row in rows]
        assert figures[0] < figures[1] < figures[2]
