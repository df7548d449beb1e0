"""Engines over a hand-made graph: they agree with each other, at any batch they can take."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from detr.data.images import read_image
from detr.errors import UserError
from detr.points import Points
from detr.types import ImageArray
from engines import open as open_module
from engines import open_bundle, open_engine
from engines.base import Engine, RawDetections
from engines.split import split

MakeBundle = Callable[..., Path]


def pictures(count: int) -> list[ImageArray]:
    generator = np.random.default_rng(1)
    sizes = [(40, 60), (31, 48), (16, 90), (8, 8)]
    return [generator.integers(0, 255, (*sizes[i % 4], 3)).astype(np.uint8) for i in range(count)]


@pytest.mark.parametrize(("threads", "points"), [(None, 3), (1, 3), (2, 3), (1, (3, 1))], ids=str)
def test_native_finds_what_onnxruntime_finds(
    toy_bundle: MakeBundle, threads: int | None, points: Points
) -> None:
    folder = toy_bundle(points=points)
    native, reference = (open_engine(folder, name, threads) for name in ("native", "onnxruntime"))
    for count in (1, 3, 2):
        inputs = reference.prepare(pictures(count))
        a, b = native.run(inputs), reference.run(inputs)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-4)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)
        assert a.labels.dtype == np.int64 and a.boxes.shape == (count, 5, 4)


@pytest.mark.parametrize("batch", [2, "dynamic"])
@pytest.mark.parametrize("name", ["native", "openvino"])
def test_values_within_the_graph(toy_bundle: MakeBundle, name: str, batch: Any) -> None:
    """Before, between and behind the attentions, and what an attention itself gives."""
    folder = toy_bundle(batch=batch)
    engine, reference = (open_engine(folder, x) for x in (name, "onnxruntime"))
    names = ["tokens", "first", "where_2", "second", "box_unit", "boxes", "no such value"]
    inputs = reference.prepare(pictures(2))
    wanted = reference.intermediates(inputs, names)
    assert wanted is not None and list(wanted) == names[:5]
    found = engine.intermediates(inputs, names)
    assert found is not None and list(found) == names[:5]
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-3, err_msg=key)
    raw, same = (x.run(inputs) for x in (engine, reference))
    np.testing.assert_allclose(raw.boxes, same.boxes, atol=1e-3)


def test_results_outlive_the_next_run(toy_bundle: MakeBundle) -> None:
    engine = open_engine(toy_bundle(), "native")
    first = engine.run(engine.prepare(pictures(1)))
    kept = first.boxes.copy()
    engine.run(engine.prepare(pictures(2)[1:]))
    np.testing.assert_array_equal(first.boxes, kept)


@pytest.mark.parametrize("name", ["onnxruntime", "native"])
def test_small_batch_is_filled_up_and_large_one_refused(toy_bundle: MakeBundle, name: str) -> None:
    engine = open_engine(toy_bundle(batch=2), name)
    assert engine.batch_size == 2
    pair, single = engine(pictures(2)), engine(pictures(1))
    assert len(single) == 1
    np.testing.assert_allclose(single[0].boxes, pair[0].boxes, atol=1e-4)
    with pytest.raises(UserError, match="a batch of 3 images") as caught:
        engine(pictures(3))
    assert caught.value.code == "batch-too-large"


def test_default_engine_of_a_bundle(
    toy_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toy_bundle()
    monkeypatch.setattr("detr.msda.native_available", lambda: False)
    assert open_engine(folder).name == "onnxruntime"
    with pytest.raises(UserError) as caught:
        open_engine(folder, "native")
    assert caught.value.code == "runtime-missing"
    monkeypatch.setattr("detr.msda.native_available", lambda: True)
    monkeypatch.setattr("engines.open.find_spec", lambda name: None)
    assert open_engine(folder).name == "native"


def test_default_engine_with_openvino(toy_bundle: MakeBundle) -> None:
    assert open_engine(toy_bundle()).name == "openvino"


def test_engines_are_opened_in_one_place() -> None:
    """Sessions of ONNX Runtime are made in one place, too, with the same options."""
    root = Path(open_module.__file__).parents[1]
    places: dict[str, set[str]] = {"engine": set(), "session": set()}
    for path in [*root.glob("engines/**/*.py"), *root.glob("export/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                kind = "session" if called == "InferenceSession" else "engine"
                if kind == "session" or re.fullmatch(r"[A-Z]\w*Engine|open_trt", called):
                    places[kind].add(str(path.relative_to(root)))
    places["engine"] -= {
        "engines/trt/engine.py",  # open_trt, which only open_engine calls
        "engines/trt/build.py",  # BuiltEngine, a file and no engine
        "export/adopt/adopt.py",  # OriginalEngine, no runtime but what a bundle is compared with
    }
    # ONNX Runtime's providers for GPUs take options of their own.
    sessions = {"engines/ort_engine.py", "engines/ort_gpu_engine.py"}
    assert places == {"engine": {"engines/open.py"}, "session": sessions}


def test_a_bundle_that_is_open_is_not_read_again(toy_bundle: MakeBundle) -> None:
    bundle = open_bundle(toy_bundle())
    (bundle.path / "bundle.json").unlink()
    assert open_engine(bundle, "onnxruntime").artifact == bundle.model
    with pytest.raises(ValueError, match="not onnxruntime"):
        open_engine(bundle, "onnxruntime", built=bundle.path)


def test_engine_names(toy_bundle: MakeBundle, tmp_path: Path) -> None:
    folder = toy_bundle()
    with pytest.raises(UserError) as caught:
        open_engine(folder, "tensorflow")
    assert caught.value.code == "engine-unknown"
    with pytest.raises(UserError) as caught:
        open_engine(folder, "torch")
    assert caught.value.code == "bundle-source" and "gone.safetensors" in caught.value.message
    weights = tmp_path / "w.safetensors"
    weights.touch()
    with pytest.raises(UserError) as caught:
        open_engine(weights, "native")
    assert caught.value.code == "engine-needs-bundle"


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P"])
def test_images_of_other_modes(toy_bundle: MakeBundle, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((12, 20), 40000, np.uint16)).save(path)
    else:
        Image.new("RGB", (20, 12), (200, 100, 50)).convert(mode).save(path)
    found = open_engine(toy_bundle())([read_image(path)])
    assert np.isfinite(found[0].boxes).all()


def test_one_pixel_image(toy_bundle: MakeBundle) -> None:
    found = open_engine(toy_bundle())([np.zeros((1, 1, 3), np.uint8)])
    assert np.isfinite(found[0].boxes).all() and np.isfinite(found[0].scores).all()


def test_split_runs_every_node_once(toy_bundle: MakeBundle) -> None:
    model = onnx.load(str(toy_bundle() / "model.onnx"))
    steps = split(model)
    assert [attention is not None for _, attention in steps] == [True, True, False]
    names = [node.output[0] for segment, _ in steps for node in segment.model.graph.node]
    assert len(names) == len(set(names))
    everything = {n.output[0] for n in model.graph.node if n.op_type != "MSDeformAttn"}
    assert set(names) == everything
    for segment, _ in steps:
        onnx.checker.check_model(segment.model, full_check=True)
    # The boxes' scale is asked for at the end only, so it is computed there.
    assert "scale" in names[names.index("where_2") :]


def test_a_model_that_suppresses_does_so_in_every_engine(toy_bundle: MakeBundle) -> None:
    engine = open_engine(toy_bundle(1), "onnxruntime")
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]], np.float32)
    raw = RawDetections(boxes, np.array([[0.9, 0.8, 0.7]], np.float32), np.zeros((1, 3), np.int64))
    assert len(engine.finish(raw)[0]) == 3
    detector = engine.info.detector.replace(nms=0.8)
    engine.info = engine.info.model_copy(update={"detector": detector})
    (found,) = engine.finish(raw)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    # No engine has a way of its own around it; stand-ins of other tests may.
    ours = [kind for kind in Engine.__subclasses__() if kind.__module__.startswith("engines.")]
    assert ours and not any("finish" in vars(kind) for kind in ours)
