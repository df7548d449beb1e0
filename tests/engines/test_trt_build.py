"""Engines are built for real by TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from detr.errors import UserError
from engines.bundle import Bundle, open_bundle
from engines.evidence import LayerCount, trusted_artifact
from engines.msda_function import HeadShape, is_attention, make_node, set_lowering
from engines.trt import build as builder
from engines.trt.backend import BACKENDS, BuildLowering
from engines.trt.build import BuildOptions, build_engine
from engines.trt.check import here_platform
from engines.trt.log import Progress
from engines.trt.lowering import lowered_model

MakeBundle = Callable[..., Path]
RTX, TENSORRT = BACKENDS["tensorrt-rtx"], BACKENDS["tensorrt"]


@pytest.fixture
def bundle(sized_bundle: Bundle) -> Bundle:
    return sized_bundle


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "compute_capability", lambda: None)


def feeds(count: int) -> dict[str, Any]:
    generator = np.random.default_rng(5)
    return {
        "images": generator.random((count, 3, 32, 48), np.float32),
        "valid_sizes": np.full((count, 2), 20, np.float32),
        "original_sizes": np.full((count, 2), 40, np.float32),
    }


@pytest.mark.parametrize("lowering", ["gather", "gridsample"])
def test_a_lowered_graph_answers_like_the_bundle(bundle: Bundle, lowering: BuildLowering) -> None:
    model = lowered_model(bundle, lowering)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions and not any(is_attention(node) for node in model.graph.node)
    names = [node.name for node in model.graph.node if node.name.startswith("attention_")]
    assert len(set(names)) == len(names) > 40, "layers could not be told apart"
    wanted, found = (
        ort.InferenceSession(what, providers=["CPUExecutionProvider"]).run(None, feeds(2))
        for what in (str(bundle.model), model.SerializeToString())
    )
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_for_a_plugin_the_node_is_left_and_nothing_else(bundle: Bundle) -> None:
    model = lowered_model(bundle, "plugin")
    assert sum(is_attention(node) for node in model.graph.node) == 2
    assert not model.functions, "a parser without the plugin would take the body silently"


@pytest.mark.slow
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("lowering", ["gather", "gridsample"])
def test_builds_for_gpus_that_are_not_here(bundle: Bundle, lowering: BuildLowering) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = build_engine(bundle, RTX, BuildOptions(lowering, (89, 86, 86), profile_batch=(1, 2, 3)))
    assert built.folder == bundle.path / "engines" / "tensorrt-rtx-sm86-89-fp32"
    trusted = trusted_artifact(built.folder)
    path, evidence = trusted.path, trusted.evidence
    assert evidence.build is not None
    assert path.stat().st_size == evidence.build.bytes > 10_000
    assert evidence == built.evidence and evidence.status == "unverified"
    assert evidence.bundle_sha256 == bundle.info.fingerprint
    assert evidence.build.compute_capabilities == (86, 89)
    assert evidence.build.batch == (1, 2, 3) and evidence.build.lowering == lowering
    assert evidence.build.plugin_sha256 is None
    assert evidence.build.memory_bytes["weights"] > 0
    assert "no CUDA device" in str(evidence.build.not_run_because)
    assert "Engine generation completed" in (built.folder / "build.log").read_text()
    report = json.loads((built.folder / "layers.json").read_text())
    # Fused layers, told by the builder; the network's are many more.
    assert report["source"] == "builder" and report["engine"] is None
    assert evidence.build.layers == LayerCount(source="builder", count=len(report["engine_layers"]))
    assert 0 < len(report["engine_layers"]) < len(report["layers"]) / 3
    assert sum(built.layers.types.values()) == len(report["engine_layers"])
    fused = [node for layer in report["engine_layers"] for node in layer["nodes"]]
    attention = {node.split("/")[0] for node in fused if node.startswith("attention")}
    assert attention == {"attention_0", "attention_1"}
    assert built.layers.types["FLOAT"] > 0
    kinds = {layer["kind"] for layer in report["layers"]}
    assert ("GRID_SAMPLE" if lowering == "gridsample" else "GATHER") in kinds
    assert "CONSTANT" not in kinds
    conv = next(layer for layer in report["layers"] if layer["kind"] == "CONVOLUTION")
    assert conv["inputs"] == ["FLOAT"] and conv["shape"] == [-1, 8, 4, 6]
    assert evidence.build.platform == here_platform()
    open_bundle(bundle.path)  # an engine in its folder does not spoil a bundle


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_an_attention_writes_no_samples_out(bundle: Bundle, half: bool) -> None:
    """One encoder attention of KITTI's size needs no more than twice its output beside it."""
    pytest.importorskip("tensorrt_rtx")
    shapes = ((51, 167), (26, 84), (13, 42), (7, 21))
    tokens = sum(h * w for h, w in shapes)
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [make_node("value", "locations", "weights", "out", shapes, "attention")],
        "one_attention",
        [
            info("value", kind, [1, tokens, 8, 32]),
            info("locations", onnx.TensorProto.FLOAT, [1, tokens, 8, 4, 4, 2]),
            info("weights", onnx.TensorProto.FLOAT, [1, tokens, 8, 4, 4]),
        ],
        [info("out", kind, [1, tokens, 256])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    set_lowering(model, HeadShape(8, 32, 4), "gather")
    onnx.save_model(model, str(bundle.model))
    sizes = {"encoder.points": 4, "decoder.cross_attention.points": 4}
    detector = bundle.info.model.detector.replace(width=256, attention_heads=8, **sizes)
    info_ = bundle.info.model_copy(
        update={"model": bundle.info.model.model_copy(update={"detector": detector}), "batch": 1}
    )
    built = build_engine(replace(bundle, info=info_), RTX, BuildOptions(compute_capabilities=(86,)))
    assert built.build.memory_bytes["activation"] <= 2 * 4 * tokens * 256


@pytest.mark.usefixtures("no_gpu")
def test_another_models_weights_in_the_working_directory(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "model.onnx.data").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    built = build_engine(bundle, RTX, BuildOptions(compute_capabilities=(86,)))
    assert trusted_artifact(built.folder).evidence == built.evidence
    assert (tmp_path / "model.onnx.data").read_bytes() == b"mine"


@pytest.mark.usefixtures("no_gpu")
def test_an_operator_the_parser_does_not_know(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = onnx.load(str(bundle.model))
    model.graph.node[-1].CopyFrom(helper.make_node("Det", ["images"], ["labels"], name="strange"))
    onnx.save_model(model, str(bundle.model))
    with pytest.raises(UserError, match="does not take node strange") as error:
        build_engine(bundle, RTX, BuildOptions(compute_capabilities=(86,)))
    assert error.value.code == "tensorrt-parse" and "(Det)" in str(error.value)
    folder = bundle.path / "engines" / "tensorrt-rtx-sm86-fp32"
    assert [path.name for path in folder.iterdir()] == ["build.log"]


@pytest.mark.usefixtures("no_gpu")
def test_an_interrupt_ends_the_build_in_good_order(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")

    def interrupt(self: Progress, *_: Any) -> None:
        raise KeyboardInterrupt

    for callback in ("start", "step", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(Progress, callback, interrupt)
            with pytest.raises(KeyboardInterrupt):
                build_engine(bundle, RTX, BuildOptions(compute_capabilities=(86,)))
    assert not list(bundle.path.glob("engines/*/model.engine"))


@pytest.mark.usefixtures("no_gpu")
def test_a_bar_that_cannot_be_shown_costs_no_engine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")

    def closed(self: Progress, name: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Progress, "_show", closed)
    built = build_engine(bundle, RTX, BuildOptions(compute_capabilities=(86,)))
    assert trusted_artifact(built.folder).evidence == built.evidence


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        (RTX, {"lowering": "plugin"}, "--lowering gather"),
        (RTX, {"timing_cache": Path("t")}, "--timing-cache"),
        (RTX, {"version_compatible": True}, "--version-compatible"),
        (RTX, {"hardware_compatible": True}, "--compute-capability"),
        (RTX, {"dla": True}, "--backend tensorrt"),
        (TENSORRT, {"compute_capabilities": (86,)}, "--backend tensorrt-rtx"),
    ],
)
def test_what_a_backend_lacks_is_refused(
    bundle: Bundle, backend: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        build_engine(bundle, backend, BuildOptions(**options))
    assert error.value.code == "engine-option"


@pytest.mark.usefixtures("no_gpu")
def test_gpus_it_cannot_build_for(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match="87; it does for 75, 80, 86") as error:
        build_engine(bundle, RTX, BuildOptions(compute_capabilities=(87,)))
    assert error.value.code == "compute-capability"
    with pytest.raises(UserError, match="--compute-capability 86,89") as error:
        build_engine(bundle, RTX)
    assert error.value.code == "device-missing"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 5, 4)])
def test_batches_that_do_not_ascend(bundle: Bundle, batch: tuple[int, int, int]) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match="ascending") as error:
        options = BuildOptions(compute_capabilities=(86,), profile_batch=batch)
        build_engine(bundle, RTX, options)
    assert error.value.code == "option-batch"
