"""ONNX Runtime on NVIDIA GPUs: its CUDA and its TensorRT-RTX execution provider."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from detr.errors import UserError
from engines.bundle import Bundle
from engines.ort_engine import OrtEngine, session_options


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: As ONNX Runtime calls it.
        options: Its settings.
        fused: Whether it compiles the graph, and so wants deformable attention as TensorRT does.
        package: What installs it.
    """

    name: str
    options: dict[str, Any]
    fused: bool
    package: str


PROVIDERS = {
    # FP32 shall be FP32, as in every other engine.
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider", {"use_tf32": "0"}, False, "onnxruntime-gpu"
    ),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", {}, True, "an onnxruntime with TensorRT-RTX"
    ),
}


class OrtGpuEngine(OrtEngine):
    """A bundle in ONNX Runtime on a GPU.

    What the provider does not take runs on the CPU, as ONNX Runtime decides; a provider that does
    not load at all is an error and not a slower run.

    Args:
        bundle: What to run.
        engine: A key of :data:`PROVIDERS`.
        threads: Threads within an operator that runs on the CPU.

    Raises:
        UserError: ``runtime-missing`` where this ONNX Runtime has no such provider, or it finds no
            GPU, driver or library it can use.
    """

    on_gpu = True

    def __init__(self, bundle: Bundle, engine: str, threads: int | None = None) -> None:
        self.name = engine
        self._provider = PROVIDERS[engine]
        if self._provider.name not in ort.get_available_providers():
            raise UserError(
                "runtime-missing",
                f"engine {engine}: onnxruntime {ort.__version__} has no {self._provider.name}; "
                f"install {self._provider.package}",
            )
        self._bundle = bundle
        super().__init__(bundle, threads)
        self.versions["provider"] = self._provider.name
        if self._provider.fused:
            self.versions["attention"] = "gather body"

    def _load(self, model: Path | onnx.ModelProto, threads: int | None) -> ort.InferenceSession:
        if isinstance(model, Path) and self._provider.fused:
            from engines.trt.lowering import lowered_model

            model = lowered_model(self._bundle, "gather")
        session = ort.InferenceSession(
            str(model) if isinstance(model, Path) else model.SerializeToString(),
            session_options(threads),
            providers=[(self._provider.name, self._provider.options), "CPUExecutionProvider"],
        )
        if session.get_providers()[0] != self._provider.name:
            raise UserError(
                "runtime-missing",
                f"engine {self.name}: {self._provider.name} did not load; it needs a GPU, its "
                "driver, and CUDA and cuDNN of the release it was built with",
            )
        return session
