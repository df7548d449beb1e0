"""From a model and the name of a runtime to an engine: the one place where engines are opened."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from detr import msda
from detr.cores import default_threads
from detr.errors import UserError
from detr.shipped import find_model
from engines.base import Engine
from engines.bundle import Bundle, is_bundle
from engines.evidence import graph_verdict
from engines.kinds import check_checkpoint
from engines.oriented import OrientedEngine, open_bundles
from engines.trt.backend import BACKENDS

if TYPE_CHECKING:
    from engines.torch_engine import TorchEngine
    from engines.trt.engine import TrtEngine

ENGINES = (
    "onnxruntime",
    "half",
    "openvino",
    "native",
    "torch",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt-rtx",
    *BACKENDS,
)


@overload
def open_engine(
    model: Path | Bundle,
    engine: Literal["torch"],
    threads: int | None = None,
    *,
    ungated: bool = False,
) -> TorchEngine: ...


@overload
def open_engine(
    model: Path | Bundle, engine: str, *, ungated: bool = False, built: Path
) -> TrtEngine: ...


@overload
def open_engine(
    model: Path | Bundle,
    engine: str | None = None,
    threads: int | None = None,
    *,
    ungated: bool = False,
) -> Engine: ...


def open_engine(
    model: Path | Bundle,
    engine: str | None = None,
    threads: int | None = None,
    *,
    ungated: bool = False,
    built: Path | None = None,
) -> Engine:
    """Loads a model into a runtime.

    Args:
        model: A bundle, a checkpoint (``.safetensors``), a run directory or a shipped model's name;
            or a bundle that is open already, whose files are not checked again.
        engine: One of :data:`ENGINES`, ``openvino:GPU`` for another device than the CPU; by
            default ``torch`` for a checkpoint. For a bundle it is ``openvino``, ``native`` where
            that is not installed, or ``onnxruntime`` where our kernel was not compiled. ``half`` is
            ONNX Runtime with every value typed float16 rounded, to see what half precision costs;
            ``onnxruntime-cuda`` and ``onnxruntime-tensorrt-rtx`` are its providers for GPUs.
        threads: Threads within an operator; :func:`detr.cores.default_threads` where ``None``.
        ungated: Opens what the parity gate rejected or has not seen without a word: for the gate.
        built: Folder of the TensorRT engine to open, in place of the bundle's that fits this
            machine best.

    Raises:
        UserError: ``model-missing``, ``model-sidecar``, ``engine-unknown``,
            ``engine-needs-bundle``, ``option-threads`` for an engine that computes on a GPU,
            ``runtime-missing``, or what opening the bundle, the checkpoint or the engine raises.
        ValueError: ``built`` for another engine than TensorRT's.
    """
    if engine is not None:
        check_name(engine)
        if threads is not None and (engine in BACKENDS or engine.startswith("openvino:GPU")):
            raise UserError("option-threads", f"engine {engine} computes on a GPU: no --threads")
    threads = threads or default_threads()
    if built is not None and engine not in BACKENDS:
        raise ValueError(f"built {built} is for {', '.join(BACKENDS)}, not {engine}")
    if isinstance(model, Bundle):
        return _of_bundle(model, engine, threads, ungated, built)
    model = find_model(Path(model))
    if not model.exists():
        raise UserError("model-missing", f"{model}: no such checkpoint, run directory or bundle")
    if is_bundle(model):
        engines = [
            _of_bundle(bundle, engine, threads, ungated, built) for bundle in open_bundles(model)
        ]
        return engines[0] if len(engines) == 1 else OrientedEngine(engines)
    if engine in (None, "torch") or model.suffix != ".safetensors":
        check_checkpoint(model)
    if engine in (None, "torch"):
        from engines.torch_engine import TorchEngine

        return TorchEngine(model, threads)
    raise UserError(
        "engine-needs-bundle",
        f"{model}: engine {engine} runs bundles; make one with: detr export onnx {model} --out OUT",
    )


def check_name(engine: str) -> None:
    """Refuses the name of a runtime there is not.

    Raises:
        UserError: ``engine-unknown``.
    """
    name, colon, _ = engine.partition(":")
    if name not in ENGINES or (colon and name != "openvino"):
        raise UserError("engine-unknown", f"engine {engine!r}: one of {', '.join(ENGINES)}")


def _of_bundle(
    bundle: Bundle, engine: str | None, threads: int | None, ungated: bool, built: Path | None
) -> Engine:
    name, _, device = (engine or _fastest()).partition(":")
    if not ungated:
        _warn_rejected(bundle, name)
    if name == "torch":
        from engines.torch_engine import TorchEngine, bundle_weights

        reference = TorchEngine(bundle_weights(bundle), threads)
        # The graph's canvas, or an image of the papers' size would lie on one of its own.
        canvas = bundle.info.model.preprocess.size
        return reference if canvas is None else reference.on_canvas(canvas)
    if name in BACKENDS:
        from engines.trt.engine import open_trt

        return open_trt(bundle, BACKENDS[name], built, ungated)
    if name.startswith("onnxruntime-"):
        from engines.ort_gpu_engine import OrtGpuEngine

        return OrtGpuEngine(bundle, name, threads)
    if name == "half":
        from engines.half_emulation import HalfEngine

        return HalfEngine(bundle, threads)
    if name == "openvino":
        from engines.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(bundle, threads, device or "CPU")
    if name == "native":
        if not msda.native_available():
            raise UserError(
                "runtime-missing",
                "engine native: our kernel was not compiled; install a C++ compiler and reinstall "
                "detr-distillery, or take engine onnxruntime",
            )
        from engines.native_engine import NativeEngine

        return NativeEngine(bundle, threads)
    from engines.ort_engine import OrtEngine

    return OrtEngine(bundle, threads)


def _warn_rejected(bundle: Bundle, engine: str) -> None:
    """Says so where the parity gate found that the bundle's graph answers wrongly in an engine."""
    verdict = graph_verdict(bundle, engine)
    if verdict is not None and verdict.status == "rejected":
        warnings.warn(
            f"{bundle.path}: the parity gate rejected it in {engine}: {'; '.join(verdict.reasons)}",
            stacklevel=4,
        )


def _fastest() -> str:
    """The fastest engine installed, as measured in docs/performance.md."""
    if not msda.native_available():
        return "onnxruntime"
    return "native" if find_spec("openvino") is None else "openvino"
