"""Engines are built: for real by TensorRT-RTX, which needs no GPU; for TensorRT by a stand-in."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from detr.cli_support import progress
from detr.config import DetectorConfig
from detr.errors import UserError
from engines import msda_plugin
from engines.bundle import SIDECAR, Bundle, open_bundle
from engines.evidence import LayerCount, trusted_artefact
from engines.msda_function import is_attention
from engines.trt import build as builder
from engines.trt.backend import BACKENDS, BuildLowering
from engines.trt.build import BuildOptions, BuiltEngine, build_engine
from engines.trt.log import Log, Progress
from engines.trt.lowering import lowered_model

MakeBundle = Callable[..., Path]
RTX, TENSORRT = BACKENDS["tensorrt-rtx"], BACKENDS["tensorrt"]


@pytest.fixture
def bundle(toy_bundle: MakeBundle) -> Bundle:
    """Of a detector with the sizes the hand-written graph has."""
    folder = toy_bundle()
    sidecar = json.loads((folder / SIDECAR).read_text())
    detector = DetectorConfig.model_validate(sidecar["model"]["detector"])
    sizes = {"encoder.points": 3, "decoder.cross_attention.points": 3}
    detector = detector.replace(width=8, attention_heads=2, **sizes)
    sidecar["model"]["detector"] = detector.model_dump(mode="json")
    (folder / SIDECAR).write_text(json.dumps(sidecar))
    return open_bundle(folder)


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


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("lowering", ["gather", "gridsample"])
def test_builds_for_gpus_that_are_not_here(bundle: Bundle, lowering: BuildLowering) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = build_engine(bundle, RTX, BuildOptions(lowering, (89, 86, 86), profile_batch=(1, 2, 3)))
    assert built.folder == bundle.path / "engines" / "tensorrt-rtx-sm86-89-fp32"
    trusted = trusted_artefact(built.folder)
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
    assert report["source"] == "network" and report["engine"] is None
    assert evidence.build.layers == LayerCount(source="network", count=len(report["layers"]))
    kinds = {layer["kind"] for layer in report["layers"]}
    assert ("GRID_SAMPLE" if lowering == "gridsample" else "GATHER") in kinds
    assert "CONSTANT" not in kinds
    conv = next(layer for layer in report["layers"] if layer["kind"] == "CONVOLUTION")
    assert conv["inputs"] == ["FLOAT"] and conv["shape"] == [-1, 8, 4, 6]
    open_bundle(bundle.path)  # an engine in its folder does not spoil a bundle


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
    assert trusted_artefact(built.folder).evidence == built.evidence


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        (RTX, {"lowering": "plugin"}, "--lowering gather"),
        (RTX, {"timing_cache": Path("t")}, "--timing-cache"),
        (RTX, {"version_compatible": True}, "--version-compatible"),
        (RTX, {"hardware_compatible": True}, "--compute-capability"),
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


class Recorder:
    """Takes every attribute and call, and remembers them."""

    def __init__(self, calls: list[Any], **fixed: Any) -> None:
        self.__dict__["calls"] = calls
        self.__dict__.update(fixed)

    def __setattr__(self, name: str, value: Any) -> None:
        self.calls.append((name, value))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


class Base:
    def __init__(self) -> None: ...


def fake_tensorrt(calls: list[Any], plan: bytes | None = b"plan") -> Any:
    """As much of TensorRT as a build touches."""
    tensor = types.SimpleNamespace(
        name="images", shape=(-1, 3, 32, 48), dtype=types.SimpleNamespace(name="HALF")
    )
    layer = types.SimpleNamespace(
        name="conv",
        type=types.SimpleNamespace(name="CONVOLUTION"),
        num_inputs=2,
        num_outputs=1,
        get_input=lambda i: (tensor, None)[i],
        get_output=lambda i: tensor,
    )
    network = types.SimpleNamespace(
        num_inputs=1, get_input=lambda i: tensor, num_layers=1, get_layer=lambda i: layer
    )
    cache = types.SimpleNamespace(serialize=lambda: b"new tactics")

    def set_timing_cache(cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        calls.append("set_timing_cache")
        return bool(cache != b"of another release")

    def create_timing_cache(data: bytes) -> Any:
        calls.append(("create_timing_cache", data))
        return None if data == b"damaged" else data

    config = Recorder(
        calls,
        get_timing_cache=lambda: cache,
        set_timing_cache=set_timing_cache,
        create_timing_cache=create_timing_cache,
    )
    profile = Recorder(calls)

    def create_network(flags: int) -> Any:
        calls.append(("create_network", flags))
        return network

    def build(network: Any, config: Any) -> bytes | None:
        calls.append("build")
        return plan

    made = types.SimpleNamespace(
        create_network=create_network,
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: profile,
        build_serialized_network=build,
    )
    return types.SimpleNamespace(
        __version__="10.16.1.11",
        ILogger=Base,
        IProgressMonitor=Base,
        Builder=lambda logger: made,
        OnnxParser=lambda network, logger: types.SimpleNamespace(parse_from_file=lambda p: True),
        NetworkDefinitionCreationFlag=types.SimpleNamespace(
            STRONGLY_TYPED=1, PREFER_AOT_PYTHON_PLUGINS=2
        ),
        BuilderFlag=types.SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VC"),
        HardwareCompatibilityLevel=types.SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS"),
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="DETAILED"),
    )


@pytest.fixture
def with_tensorrt(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[BuiltEngine, list[Any]]]:
    """Builds with the stand-in as if there were a GPU; its inspector tells nothing."""

    def run(plan: bytes | None = b"plan", **options: Any) -> tuple[BuiltEngine, list[Any]]:
        calls: list[Any] = []
        monkeypatch.setattr(builder, "load", lambda backend: fake_tensorrt(calls, plan))
        monkeypatch.setattr(builder, "compute_capability", lambda: 86)
        monkeypatch.setattr(builder, "_opened", lambda trt, build, data: (build.layers, 99))
        monkeypatch.setattr(msda_plugin, "register", lambda: calls.append("register"))
        return build_engine(bundle, TENSORRT, BuildOptions(**options)), calls

    return run


def test_tensorrt_builds_with_the_plugin(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]],
) -> None:
    built, calls = with_tensorrt()
    assert calls[:2] == ["register", ("create_network", 0b110)]
    assert ("clear_flag", "TF32") in calls and ("profiling_verbosity", "DETAILED") in calls
    shapes = tuple((size, 3, 32, 48) for size in (1, 1, 4))
    assert ("set_shape", "images", *shapes) in calls
    assert calls.index("build") > [c[0] for c in calls].index("add_optimization_profile")
    assert not any("compute_capability" in str(call) for call in calls)
    assert built.folder.name == "tensorrt-sm86-fp32"
    build = built.build
    assert build.lowering == "plugin" and build.plugin_sha256 == builder.plugin_hash()
    assert build.memory_bytes == {"device": 99} and build.not_run_because is None
    assert built.layers.types == {"HALF": 1} and built.layers.layers[0].inputs == ("HALF",)


def test_tensorrt_without_the_plugin(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]],
) -> None:
    built, calls = with_tensorrt(lowering="gather")
    assert calls[0] == ("create_network", 0b010) and "register" not in calls
    assert built.build.plugin_sha256 is None


def test_engines_for_other_releases_and_gpus(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]],
) -> None:
    built, calls = with_tensorrt(version_compatible=True, hardware_compatible=True)
    assert ("set_flag", "VC") in calls
    assert ("hardware_compatibility_level", "AMPERE_PLUS") in calls
    assert built.folder.name == "tensorrt-ampere-plus-fp32"
    assert built.build.hardware_compatible is True


def test_tactics_are_kept_for_the_next_build(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "tactics.cache"
    _, calls = with_tensorrt(timing_cache=path)
    assert ("create_timing_cache", b"") in calls and path.read_bytes() == b"new tactics"
    _, calls = with_tensorrt(timing_cache=path)
    assert ("create_timing_cache", b"new tactics") in calls
    with pytest.raises(UserError, match="timing-cache"):
        with_tensorrt(timing_cache=tmp_path)


@pytest.mark.parametrize("old", [b"damaged", b"of another release"])
def test_tactics_that_do_not_fit_are_measured_anew(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]], tmp_path: Path, old: bytes
) -> None:
    path = tmp_path / "tactics.cache"
    path.write_bytes(old)
    _, calls = with_tensorrt(timing_cache=path)
    assert calls.index(("create_timing_cache", b"")) < calls.index("build")
    assert path.read_bytes() == b"new tactics"


def test_a_build_that_gives_nothing(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]], bundle: Bundle
) -> None:
    with pytest.raises(UserError, match="built no engine: no reason given; more in") as error:
        with_tensorrt(plan=None)
    assert error.value.code == "tensorrt-build"
    assert not (bundle.path / "engines" / "tensorrt-sm86-fp32" / "evidence.json").exists()


def test_the_log_keeps_everything_but_the_verbose() -> None:
    log = Log()
    for severity in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
        log.add(severity, f"a {severity}")
    assert [line.split(maxsplit=1)[1] for line in log.lines] == [
        "INFO: a INFO",
        "WARNING: a WARNING",
        "ERROR: a ERROR",
        "INTERNAL_ERROR: a INTERNAL_ERROR",
    ]
    assert log.errors == ["a ERROR", "a INTERNAL_ERROR"] and log.text().count("\n") == 4


def shares(steps: Sequence[tuple[Any, ...]]) -> list[float]:
    bar = progress(iter(()), "build", 100)
    watch = Progress(bar)
    seen = []
    for step in steps:
        {"start": watch.start, "step": watch.step, "finish": watch.finish}[step[0]](*step[1:])
        seen.append(bar.n)
    bar.close()
    return seen


def test_phases_within_phases_are_one_percentage() -> None:
    seen = shares(
        [
            ("start", "all", None, 4),
            ("step", "all", 0),
            ("start", "part", "all", 2),
            ("step", "part", 0),
            ("start", "detail", "part", 10),
            ("step", "detail", 4),
            ("finish", "detail"),
            ("finish", "part"),
            ("step", "all", 1),
            ("start", "part", "all", 2),  # once more, for another target
            ("finish", "part"),
            ("finish", "all"),
        ]
    )
    assert seen == [0, 25, 25, 37, 37, 43, 43, 43, 50, 50, 50, 100]


def test_phases_nobody_announced_do_no_harm() -> None:
    assert shares([("step", "unknown", 3), ("finish", "unknown")]) == [0, 0]
