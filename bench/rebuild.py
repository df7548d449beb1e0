"""Building and proving a bundle's engine on the machine it is about to be measured on.

The work is ``detr export``'s, in a process of its own: what the builder holds of the GPU is free
again before anything is timed, and what is measured has passed the same gate as any export.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detr.errors import GateError, UserError
from engines.oriented import open_bundles
from engines.trt.backend import BACKENDS

# Proving compares with ONNX Runtime on the processor, which on a target takes seconds an image.
PROVED_IMAGES = 32

Call = Callable[[Sequence[str]], int]


def rebuild(
    models: Sequence[Path], engine: str | None, data: str, call: Call | None = None
) -> None:
    """Builds each bundle's engine here and verifies it on its golden images and on the data.

    An engine that is not built from the bundle (``native``, ``openvino``, ``onnxruntime``) is
    verified only.

    Args:
        models: Bundles.
        engine: Runtime to build for.
        data: Data set specification.
        call: Runs ``detr`` with these arguments and returns its exit status.

    Raises:
        UserError: ``rebuild-engine`` (no engine named), ``rebuild-failed``, and what opening the
            bundle raises.
        GateError: ``rebuild-rejected``: the engine does not find what the model finds.
    """
    if engine is None:
        raise UserError("rebuild-engine", "--rebuild: say for which runtime with --engine")
    for model in models:
        for command in commands([b.path for b in open_bundles(model)], engine, data):
            status = (call or _detr)(command)
            line = shlex.join(["detr", *command])
            if status == GateError.exit_status:
                raise GateError(
                    "rebuild-rejected", f"{model}: not measured, it did not pass {line} (see above)"
                )
            if status != 0:
                raise UserError(
                    "rebuild-failed", f"{model}: not measured, {line} failed (see above)"
                )


def commands(bundles: Sequence[Path], engine: str, data: str) -> list[list[str]]:
    """The ``detr`` commands that build and prove a model's engine, or its two."""
    found = []
    for bundle in map(str, bundles):
        if engine in BACKENDS:
            found.append(["export", "trt", bundle, "--backend", engine])
        found.append(["export", "verify", bundle, "--engine", engine, "--data", data])
        found[-1] += ["--images", str(PROVED_IMAGES)]
    return found


def _detr(arguments: Sequence[str]) -> int:
    # Standard output is the report's; what the commands say goes where progress goes.
    return subprocess.run([sys.executable, "-m", "detr", *arguments], stdout=sys.stderr).returncode
