"""What is asked of TensorRT, which no machine without a GPU builds with: a stand-in takes notes."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from detr.errors import UserError
from detr.msda import cuda_kernels
from engines import msda_plugin
from engines.bundle import Bundle
from engines.evidence import PtxVersions
from engines.trt import build as builder
from engines.trt.backend import BACKENDS
from engines.trt.build import BuildOptions, BuiltEngine, build_engine
from engines.trt.layers import network_layers, with_engine

TENSORRT = BACKENDS["tensorrt"]


@pytest.fixture
def bundle(sized_bundle: Bundle) -> Bundle:
    return sized_bundle


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


def fake_tensorrt(calls: list[Any], plan: bytes | None = b"plan", accelerators: int = 2) -> Any:
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
        can_run_on_DLA=lambda layer: layer.type.name == "CONVOLUTION",
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
        num_DLA_cores=accelerators,
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
        BuilderFlag=types.SimpleNamespace(
            TF32="TF32", VERSION_COMPATIBLE="VC", GPU_FALLBACK="GPU_FALLBACK"
        ),
        DeviceType=types.SimpleNamespace(GPU="GPU", DLA="DLA"),
        HardwareCompatibilityLevel=types.SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS"),
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="DETAILED"),
    )


@pytest.fixture
def with_tensorrt(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[BuiltEngine, list[Any]]]:
    """Builds with the stand-in as if there were a GPU; its inspector tells nothing."""

    def compiled(source: str, architecture: str, kind: str) -> bytes:
        assert (architecture, kind) == ("compute_75", "PTX") and "MSDA_CHANNELS 4" in source
        return b"//\n.version 9.5\n.target sm_75\n\0"

    def run(
        plan: bytes | None = b"plan", version: str = "10.16.1.11", **options: Any
    ) -> tuple[BuiltEngine, list[Any]]:
        calls: list[Any] = []
        cuda_kernels.compile_ptx.cache_clear()
        fake = fake_tensorrt(calls, plan)
        fake.__version__ = version
        monkeypatch.setattr(builder, "load", lambda backend: fake)
        monkeypatch.setattr(builder, "compute_capability", lambda: 86)
        monkeypatch.setattr(builder, "_opened", lambda trt, build, data: (build.layers, 99))
        monkeypatch.setattr(msda_plugin, "register", lambda: calls.append("register"))
        monkeypatch.setattr(cuda_kernels, "_compile_text", compiled)
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
    # A driver older than the compiler refuses PTX of the compiler's version.
    assert build.ptx == PtxVersions(compiled="9.5", embedded="6.3")
    assert built.layers.types == {"HALF": 1} and built.layers.layers[0].inputs == ("HALF",)


def test_a_release_without_plugins_gets_standard_operators(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]],
) -> None:
    built, calls = with_tensorrt(version="10.3.0")
    assert calls[0] == ("create_network", 0b010) and "register" not in calls
    assert built.build.lowering == "gather" and built.build.ptx is None
    with pytest.raises(UserError, match=r"10\.3\.0 does not compile plugins") as error:
        with_tensorrt(version="10.3.0", lowering="plugin")
    assert error.value.code == "engine-option"


def test_a_plugin_that_cannot_be_compiled_is_told_before_the_build(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TensorRT asks for it from C++, where the reason would be lost."""

    def missing() -> Any:
        raise UserError("cuda-bindings-missing", "no NVRTC")

    with monkeypatch.context() as patch:
        patch.setattr(msda_plugin, "compile_ptx", lambda *_: missing())
        with pytest.raises(UserError, match="no NVRTC"):
            with_tensorrt()
    model = onnx.load(str(bundle.model))
    wide = next(w for w in model.graph.initializer if w.name == "by_head")
    wide.CopyFrom(numpy_helper.from_array(np.array([0, 0, 1, 8 * 257], np.int64), "by_head"))
    onnx.save_model(model, str(bundle.model))
    with pytest.raises(UserError, match="no kernel for") as error:
        with_tensorrt()
    assert error.value.code == "plugin-shape"
    assert not (bundle.path / "engines").exists(), "a build was begun"


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


def test_backbone_and_neck_on_the_accelerator(
    with_tensorrt: Callable[..., tuple[BuiltEngine, list[Any]]], bundle: Bundle
) -> None:
    with pytest.raises(UserError, match="export it with --precision fp16") as error:
        with_tensorrt(dla=True)
    assert error.value.code == "engine-option"
    model = onnx.load(str(bundle.model))
    model.graph.node[0].name = "conv"
    onnx.save_model(model, str(bundle.model))
    object.__setattr__(bundle, "info", bundle.info.model_copy(update={"precision": "fp16"}))
    built, calls = with_tensorrt(dla=True)
    assert built.folder.name == "tensorrt-sm86-dla-fp16"
    assert built.build.dla_layers == 1
    devices = [call for call in calls if call[0] == "set_device_type"]
    assert [(layer.name, device) for _, layer, device in devices] == [("conv", "DLA")]
    assert ("set_flag", "GPU_FALLBACK") in calls and ("DLA_core", 0) in calls
    assert calls.index(("DLA_core", 0)) < calls.index("build")


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


def inspected(text: str) -> Any:
    """An opened engine whose inspector says this; and the module."""
    inspector = types.SimpleNamespace(get_engine_information=lambda form: text)
    module = types.SimpleNamespace(LayerInformationFormat=types.SimpleNamespace(JSON="JSON"))
    return module, types.SimpleNamespace(create_engine_inspector=lambda: inspector)


def test_after_a_build_the_layers_are_the_engines() -> None:
    """The inspector's three ways to tell of a layer, and what it says that is none."""
    network = fake_tensorrt([]).Builder(None).create_network(0)
    report = network_layers(network)
    assert report.source == "network" and report.count == 1 and report.types == {"HALF": 1}
    half = [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}]
    layers: list[Any] = [
        {"Name": "__myl_a", "LayerType": "kgen", "Outputs": half, "Metadata": "[ONNX Layer: /n]"},
        {"Name": "gemm", "LayerType": "gemm", "Outputs": [{"Datatype": "Float"}]},
        "a name only",
    ]
    told = with_engine(report, *inspected(json.dumps({"Layers": layers, "Bindings": []})))
    assert told.source == "engine" and told.count == 3 and len(told.layers) == 1
    assert told.types == {"HALF": 1, "FLOAT": 1, "none": 1}
    assert told.engine_layers[0].nodes == ("/n",)
    for strange in ("no JSON", "[]", '{"Layers": [{"LayerType": "kgen"}]}'):
        told = with_engine(report, *inspected(strange))
        assert told.source == "network" and told.engine == {"not understood": strange}
