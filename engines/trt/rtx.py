"""What only TensorRT-RTX has: targets by number, and the last compilation on the target.

An engine of TensorRT-RTX is compiled for the GPU when it is opened. Three things follow. Kernels
for the shapes of a run are compiled before it (the default would run slower ones meanwhile, and
they would be timed); what was compiled is kept for the next process; and memory is ours to give,
since a run that allocates cannot be recorded in a CUDA graph.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detr.errors import UserError
from detr.files import write_atomic
from engines.trt.cuda import Device


def check_targets(trt: Any, capabilities: tuple[int, ...]) -> None:
    """Refuses GPUs that TensorRT-RTX cannot build for.

    Raises:
        UserError: ``compute-capability``.
    """
    known = sorted(int(name[2:]) for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    unknown = sorted(set(capabilities) - set(known))
    if unknown:
        raise UserError(
            "compute-capability",
            f"tensorrt-rtx {trt.__version__} does not build for compute capability {unknown[0]}; "
            f"it does for {', '.join(map(str, known))}",
        )


def configure(trt: Any, config: Any, capabilities: tuple[int, ...]) -> None:
    """Tells a builder which GPUs the engine is for, and that it shall allocate nothing in a run."""
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


class RuntimeCache:
    """Kernels compiled for this machine's GPU, kept in the user's own cache folder.

    Never in the bundle: they are code, and a bundle comes from elsewhere. TensorRT-RTX checks that
    they are of this release, GPU and driver, and compiles anew where they are not.

    Args:
        engine_sha256: Hash of the engine they belong to.
    """

    def __init__(self, engine_sha256: str) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = base / "detr-distillery" / f"tensorrt-rtx-{engine_sha256}.cache"
        self._runtime_cache: Any = None
        self._kept = b""

    def attach(self, runtime_config: Any) -> None:
        """Gives a context's configuration the cache, with what an earlier process left in it."""
        if self._runtime_cache is None:
            self._runtime_cache = runtime_config.create_runtime_cache()
            try:
                self._kept = self._path.read_bytes()
            except OSError:  # none yet
                self._kept = b""
            if self._kept and not self._runtime_cache.deserialize(self._kept):
                self._kept = b""
        runtime_config.set_runtime_cache(self._runtime_cache)

    def save(self) -> None:
        """Keeps what was compiled since; a cache that cannot be written costs time, not a run."""
        content = bytes(self._runtime_cache.serialize())
        if content == self._kept:
            return
        try:
            write_atomic(self._path, content)
        except UserError:
            return
        self._kept = content


def create_context(trt: Any, engine: Any, device: Device, cache: RuntimeCache) -> Any:
    """An execution context whose work can be recorded; ``None`` where TensorRT-RTX makes none."""
    runtime_config = engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    runtime_config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    cache.attach(runtime_config)
    context = engine.create_execution_context(runtime_config)
    size = int(engine.device_memory_size_v2)
    if context is not None and size:
        context.set_device_memory(device.memory(size), size)
    return context


def capturable(context: Any, stream: int) -> bool:
    """Whether a context's work can be recorded in a CUDA graph."""
    return bool(context.is_stream_capturable(stream))
