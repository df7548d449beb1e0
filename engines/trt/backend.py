"""The two TensorRT runtimes, and everything in which they differ for us.

Their Python API is the same but for what this table says: TensorRT builds for the GPU it runs on
and takes plugins; TensorRT-RTX builds for compute capabilities given by number, also on a machine
without a GPU, and compiles the last step on the target.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detr.errors import UserError
from engines.msda_function import Lowering

# On a Jetson, and nowhere else.
TEGRA = Path("/etc/nv_tegra_release")

BackendName = Literal["tensorrt", "tensorrt-rtx"]
BuildLowering = Literal["plugin"] | Lowering


@dataclass(frozen=True)
class Backend:
    """One of the runtimes.

    Attributes:
        name: As ``open_engine`` takes it.
        module: Python module of the runtime.
        extra: Our extra that installs it.
        minimum: Oldest release that reads the graphs we write.
        plugins: First release that takes our quick plugin compiled ahead of time; ``None`` where
            none does.
        names_targets: Whether it builds for compute capabilities by number and without a GPU; the
            other one builds for the GPU of the machine.
        timing_cache: Whether measured tactics can be kept for the next build.
        compatibility: Whether it builds engines for other releases and for other architectures.
    """

    name: BackendName
    module: str
    extra: str
    minimum: tuple[int, int]
    plugins: tuple[int, int] | None
    names_targets: bool
    timing_cache: bool
    compatibility: bool

    def takes_plugins(self, version: str) -> bool:
        """Whether a release embeds our kernel."""
        return self.plugins is not None and release(version)[:2] >= self.plugins

    def lowering(self, version: str) -> BuildLowering:
        """How deformable attention is computed in a release unless asked otherwise."""
        return "plugin" if self.takes_plugins(version) else "gather"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "tensorrt",
            module="tensorrt",
            extra="trt",
            minimum=(10, 3),
            plugins=(10, 9),
            names_targets=False,
            timing_cache=True,
            compatibility=True,
        ),
        Backend(
            "tensorrt-rtx",
            module="tensorrt_rtx",
            extra="rtx",
            minimum=(1, 7),
            plugins=None,
            names_targets=True,
            timing_cache=False,
            compatibility=False,
        ),
    )
}


def load(backend: Backend) -> Any:
    """Imports the runtime's module.

    Raises:
        UserError: ``tensorrt-missing`` or ``tensorrt-version``.
    """
    try:
        trt = importlib.import_module(backend.module)
    except (ImportError, OSError) as reason:
        raise UserError(
            "tensorrt-missing",
            f"engine {backend.name} needs {backend.module}: "
            f"pip install 'detr-distillery[{backend.extra}]' ({reason})",
        ) from reason
    if release(trt.__version__)[:2] < backend.minimum:
        oldest = ".".join(str(part) for part in backend.minimum)
        raise UserError(
            "tensorrt-version",
            f"engine {backend.name}: {backend.module} {trt.__version__} is too old, it must be "
            f"{oldest} or newer: {_way_to_newer(backend)}",
        )
    return trt


def _way_to_newer(backend: Backend) -> str:
    """How a newer release is had; a Jetson's comes with its system and not from an index."""
    if TEGRA.exists():
        return "JetPack 6.1 has 10.3, JetPack 7 a newer one"
    return f"pip install -U 'detr-distillery[{backend.extra}]'"


def release(version: str) -> tuple[int, int, int]:
    """Major, minor and patch of a version such as ``10.16.1.11``."""
    numbers = [int(part) for part in version.split(".")[:3] if part.isdigit()]
    major, minor, patch = (numbers + [0, 0, 0])[:3]
    return major, minor, patch
