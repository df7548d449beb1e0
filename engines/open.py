"""From a path and the name of a runtime to an engine."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

from detr import msda
from detr.errors import UserError
from detr.shipped import find_model
from engines.base import Engine
from engines.bundle import Bundle, is_bundle, open_bundle
from engines.evidence import graph_evidence
from engines.trt.backend import BACKENDS

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


def open_engine(model: Path, engine: str | None = None, threads: int | None = None) -> Engine:
    """Loads a model into a runtime.

    Args:
        model: A bundle, a checkpoint (``.safetensors``), a run directory or a shipped model's name.
        engine: One of :data:`ENGINES`, ``openvino:GPU`` for another device than the CPU; by
            default ``torch`` for a checkpoint. For a bundle it is ``openvino``, ``native`` where
            that is not installed, or ``onnxruntime`` where our kernel was not compiled. ``half`` is
            ONNX Runtime with every value typed float16 rounded, to see what half precision costs;
            ``onnxruntime-cuda`` and ``onnxruntime-tensorrt-rtx`` are its providers for GPUs.
        threads: Threads within an operator; the runtime's default where ``None``.

    Raises:
        UserError: ``model-missing``, ``engine-unknown``, ``engine-needs-bundle``,
            ``runtime-missing``, or what opening the bundle, the checkpoint or the engine raises.
    """
    model = find_model(Path(model))
    if not model.exists():
        raise UserError("model-missing", f"{model}: no such checkpoint, run directory or bundle")
    if engine is not None:
        check_name(engine)
    if is_bundle(model):
        return engine_of(open_bundle(model), engine, threads)
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


def engine_of(bundle: Bundle, engine: str | None = None, threads: int | None = None) -> Engine:
    """Loads a bundle whose files need no checking; else as :func:`open_engine`."""
    name, _, device = (engine or _fastest()).partition(":")
    _warn_rejected(bundle, name)
    if name == "torch":
        from engines.torch_engine import TorchEngine, bundle_weights

        return TorchEngine(bundle_weights(bundle), threads)
    if name in BACKENDS:
        from engines.trt.engine import open_trt

        return open_trt(bundle, BACKENDS[name])
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
    evidence = graph_evidence(bundle)
    verdict = {} if evidence is None else evidence.verdicts.get(engine, {})
    if verdict.get("status") == "rejected":
        warnings.warn(
            f"{bundle.path}: the parity gate rejected it in {engine}: "
            f"{'; '.join(verdict.get('reasons', []))}",
            stacklevel=3,
        )


def _fastest() -> str:
    """The fastest engine installed, as measured in docs/performance.md."""
    if not msda.native_available():
        return "onnxruntime"
    return "native" if find_spec("openvino") is None else "openvino"
