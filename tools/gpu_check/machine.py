"""What the check ran on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from bench.machine.clocks import read_clocks
from engines.trt.cuda import checked, compute_capability, runtime

PACKAGES = (
    "cuda-bindings",
    "detr-distillery",
    "numpy",
    "nvidia-cuda-nvrtc",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "triton",
)


def machine() -> dict[str, Any]:
    """The GPU, its driver and the packages; what cannot be read says why."""
    cudart = runtime()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Callable[[], Any]] = {
        "gpu": lambda: checked(cudart.cudaGetDeviceProperties(0)).name.decode(),
        "memory_bytes": lambda: int(checked(cudart.cudaGetDeviceProperties(0)).totalGlobalMem),
        "compute_capability": compute_capability,
        "cuda_driver": lambda: checked(cudart.cudaDriverGetVersion()),
        "cuda_runtime": lambda: checked(cudart.cudaRuntimeGetVersion()),
        "clocks": lambda: str(read_clocks()),
    }
    found: dict[str, Any] = {"packages": versions}
    for name, fact in facts.items():
        try:
            found[name] = fact()
        except Exception as error:  # one driver's quirk must not cost the whole check
            found[name] = f"not read: {error}"
    return found
