"""Someone's ONNX file becomes a bundle that answers like it, or one line says why not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper

from detr.errors import UserError
from engines.bundle import open_bundle
from engines.open import open_engine
from export.adopt.prepare import load, static, to_known_opset
from export.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from adopt_graphs import Nodes

SIZE, QUERIES, CLASSES = (32, 48), 6, 3


def detector(
    outputs: str = "queries", classes: int = CLASSES, opset: int = 17, **inputs: list[int]
) -> ModelProto:
    """A few numbers that follow from the image: class outputs and boxes, or ready detections."""
    rng = np.random.default_rng(0)
    n = Nodes()
    pooled = n.op("AveragePool", "pixels", kernel_shape=[16, 16], strides=[16, 16])
    flat = n.op("Flatten", pooled, axis=1)  # 3 * 2 * 3 numbers

    def rows(count: int, scale: float) -> Any:
        weight = n.const(rng.normal(size=(18, QUERIES * count)) * scale, np.float32)
        bias = n.const(rng.normal(size=QUERIES * count), np.float32)
        return n.reshape(n.op("Add", n.op("MatMul", flat, weight), bias), 1, QUERIES, count)

    logits, boxes = rows(classes, 0.5), n.op("Sigmoid", rows(4, 0.5))
    shapes = {"pixels": [1, 3, *SIZE], **inputs}
    if outputs == "queries":
        made = [(logits, "logits", [1, QUERIES, classes]), (boxes, "boxes_out", [1, QUERIES, 4])]
    elif outputs in ("scored", "detections", "pixels"):
        made = [(_rows(n, outputs, logits, boxes, classes), "rows", [1, QUERIES, None])]
    else:
        scores = n.op("ReduceMax", n.op("Sigmoid", logits), axes=[2], keepdims=0)
        labels = n.op("ArgMax", logits, axis=2, keepdims=0)
        given = n.op("Cast", "target_sizes", to=TensorProto.FLOAT)
        pixels = n.op("Mul", boxes, n.op("Concat", given, given, axis=1))
        made = [
            (labels, "labels", [1, QUERIES]),
            (pixels, "boxes", [1, QUERIES, 4]),
            (scores, "scores", [1, QUERIES]),
        ]
        shapes["target_sizes"] = [1, 2]
    for value, name, _ in made:
        if value != name:
            n.nodes.append(helper.make_node("Identity", [value], [name]))
    kinds = {"labels": TensorProto.INT64, "target_sizes": TensorProto.INT64}
    graph = helper.make_graph(
        n.nodes,
        "g",
        [helper.make_tensor_value_info(k, kinds.get(k, 1), v) for k, v in shapes.items()],
        [helper.make_tensor_value_info(name, kinds.get(name, 1), size) for _, name, size in made],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _rows(n: Nodes, kind: str, logits: str, boxes: str, classes: int) -> str:
    """One output as ultralytics' exporters write it: of all scores, or of the best ones' boxes."""
    boxes = n.op(
        "Squeeze", n.op("Concat", n.op("Unsqueeze", boxes, n.const([0])), axis=0), n.const([0])
    )
    scores = n.op("Sigmoid", logits)
    parts = [boxes, scores]
    if kind != "scored":
        best, index = n.op("TopK", n.op("Flatten", scores), n.const([QUERIES]), outputs=2, axis=1)
        query = n.op("Div", index, n.const(classes))
        label = n.op("Sub", index, n.op("Mul", query, n.const(classes)))
        four = n.op("Expand", n.op("Unsqueeze", query, n.const([2])), n.const([1, QUERIES, 4]))
        found = n.op("GatherElements", boxes, four, axis=1)
        if kind == "pixels":  # as YOLO's exporters write it
            found = n.op("Mul", found, n.const(48.0, np.float32))
        label = n.op("Cast", n.op("Unsqueeze", label, n.const([2])), to=TensorProto.FLOAT)
        parts = [found, n.op("Unsqueeze", best, n.const([2])), label]
    n.nodes.append(helper.make_node("Concat", parts, ["rows"], axis=-1))
    return "rows"


def written(folder: Path, model: ModelProto, classes: int = CLASSES) -> list[str]:
    """The command line for a model, which it writes."""
    onnx.save_model(model, str(folder / "theirs.onnx"))
    names = {"names": [f"c{i}" for i in range(classes)], "category_ids": list(range(classes))}
    (folder / "classes.json").write_text(json.dumps(names))
    size = f"{SIZE[0]}x{SIZE[1]}"
    files = [str(folder / "theirs.onnx"), "--out", str(folder / "a.bundle")]
    return ["adopt", *files, "--classes", str(folder / "classes.json"), "--size", size]


READINGS: dict[str, tuple[Callable[[], ModelProto], list[str], str]] = {
    "sigmoid": (detector, ["--pixels", "unit"], "sigmoid"),
    "softmax": (
        lambda: detector(classes=CLASSES + 1),
        ["--pixels", "imagenet", "--scores", "softmax"],
        "softmax",
    ),
    "fewer": (detector, ["--pixels", "unit", "--detections", "2"], "sigmoid"),
    "ready": (lambda: detector("ready"), ["--pixels", "unit"], "sigmoid"),
    "scored-rows": (lambda: detector("scored"), ["--pixels", "unit"], "sigmoid"),
    "detection-rows": (lambda: detector("detections"), ["--pixels", "unit"], "sigmoid"),
}


@pytest.mark.parametrize(("make", "options", "scores"), READINGS.values(), ids=READINGS)
def test_a_bundle_answers_like_the_file(
    make: Callable[[], ModelProto], options: list[str], scores: str, tmp_path: Path
) -> None:
    """The reference computes the detections in numpy, from the untouched file."""
    command = written(tmp_path, make())
    before = (tmp_path / "theirs.onnx").read_bytes()
    run = CliRunner().invoke(main, [*command, *options, "--json"], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    assert (tmp_path / "theirs.onnx").read_bytes() == before
    bundle = open_bundle(tmp_path / "a.bundle")
    assert json.loads(run.stdout)["model"]["provenance"]["scores"] == scores
    assert bundle.info.model.detections == (2 if "--detections" in options else QUERIES)
    assert bundle.info.parity is not None
    golden = bundle.golden()
    for name in ("onnxruntime", "openvino"):
        engine = open_engine(bundle, name)
        for image, expected in zip(golden.images, golden.detections, strict=True):
            found = engine([image])[0]
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
            np.testing.assert_array_equal(found.labels, expected.labels)
            height, width = image.shape[:2]
            assert (found.boxes <= np.array([width, height, width, height])).all()


def test_boxes_are_where_the_file_has_them(tmp_path: Path) -> None:
    """By hand: from parts of the canvas to pixels of an image that fills a part of it."""
    import onnxruntime as ort

    command = written(tmp_path, detector())
    run = CliRunner().invoke(main, [*command, "--pixels", "unit"], catch_exceptions=False)
    assert run.exit_code == 0
    engine = open_engine(tmp_path / "a.bundle", "onnxruntime")
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = engine.prepare([image])  # 32 x 32 of a canvas of 32 x 48
    session = ort.InferenceSession(str(tmp_path / "theirs.onnx"))
    logits, boxes = (x[0] for x in session.run(None, {"pixels": inputs.images}))
    query, label = divmod(int(logits.argmax()), CLASSES)
    center_x, center_y, width, height = boxes[query]
    expected = np.array(
        [
            (center_x - width / 2) * 48 * 2,
            (center_y - height / 2) * 32 * 2,
            (center_x + width / 2) * 48 * 2,
            (center_y + height / 2) * 32 * 2,
        ]
    )
    best = engine([image])[0]
    np.testing.assert_allclose(best.boxes[0], expected.clip(0, 64), atol=1e-3)
    assert best.labels[0] == label


MISTAKES: dict[str, tuple[Callable[[], ModelProto], list[str], str]] = {
    "ambiguous": (lambda: detector(classes=CLASSES + 1), [], "adopt-scores"),
    "wrong-scores": (detector, ["--scores", "softmax"], "adopt-scores"),
    "fewer-outputs": (lambda: detector(classes=2), [], "weights-classes"),
    "another-size": (detector, ["--size", "64x48"], "adopt-input"),
    "tiny": (detector, ["--size", "4x4"], "size-form"),
    "more-inputs": (lambda: detector(mask=[1, *SIZE]), [], "adopt-input"),
    "softmax-of-rows": (
        lambda: detector("scored", CLASSES + 1),
        ["--scores", "softmax"],
        "adopt-scores",
    ),
    "rows-in-pixels": (lambda: detector("pixels"), [], "adopt-output"),
    "scores-of-scores": (lambda: detector("ready"), ["--scores", "sigmoid"], "adopt-scores"),
}


@pytest.mark.parametrize(("make", "options", "code"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_not_known_is_one_line(
    make: Callable[[], ModelProto], options: list[str], code: str, tmp_path: Path
) -> None:
    command = written(tmp_path, make())
    run = CliRunner().invoke(main, [*command, "--pixels", "unit", *options])
    assert run.exit_code == 2 and f"error[{code}]" in run.stderr, run.stderr
    assert not (tmp_path / "a.bundle").exists()


def test_outputs_of_another_kind_are_listed(tmp_path: Path) -> None:
    n = Nodes()
    last = n.op("Relu", "pixels")
    command = written(tmp_path, n.model(last, (1, 3, *SIZE), pixels=(1, 3, *SIZE)))
    run = CliRunner().invoke(main, [*command, "--pixels", "unit"])
    assert "error[adopt-output]" in run.stderr and f"{last} float [1, 3, 32, 48]" in run.stderr


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    command = written(tmp_path, detector())
    (tmp_path / "theirs.onnx").write_bytes(b"\x00\x01nothing")
    run = CliRunner().invoke(main, [*command, "--pixels", "unit"])
    assert run.exit_code == 2 and "error[adopt-unreadable]" in run.stderr
    (tmp_path / "theirs.onnx").unlink()
    run = CliRunner().invoke(main, [*command, "--pixels", "unit"])
    assert run.stderr.endswith("theirs.onnx: No such file or directory\n")


def test_dynamic_sizes_become_those_asked_for(tmp_path: Path) -> None:
    model = detector()
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    fixed = static(model, {"pixels": (1, 3, *SIZE)}, Path("theirs.onnx"))
    sizes = [d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, *SIZE]


def test_an_older_opset_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(detector(opset=16), str(path))
    model = to_known_opset(load(path), path)
    assert model.opset_import[0].version == 17


def test_what_the_runtime_cannot_run_is_told(tmp_path: Path) -> None:
    n = Nodes()
    last = n.op("GridSample", "pixels", "grid")
    double = TensorProto.DOUBLE
    graph = helper.make_graph(
        n.nodes,
        "g",
        [
            helper.make_tensor_value_info("pixels", double, [1, 3, 4, 4]),
            helper.make_tensor_value_info("grid", double, [1, 4, 4, 2]),
        ],
        [helper.make_tensor_value_info(last, double, [1, 3, 4, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(UserError) as caught:
        static(model, {}, Path("theirs.onnx"))
    assert caught.value.code == "adopt-unrunnable"
