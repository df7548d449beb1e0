"""The torch model itself, on the CPU: what an export must reproduce. Torch is imported on use."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

from detr.cli_support import missing_extra
from detr.data.preprocess import Inputs
from detr.errors import UserError
from detr.files import sha256
from detr.model_info import AdoptedInfo
from engines.base import Engine, RawDetections
from engines.bundle import Bundle


class TorchEngine(Engine):
    """A checkpoint in torch, eager mode.

    Args:
        weights: ``NAME.safetensors`` with its sidecar, or a run directory.
        threads: Threads within an operator; torch keeps them per process, so they are set for the
            time of each run only.

    Raises:
        UserError: ``extra-missing`` where torch is not installed.
    """

    name = "torch"

    def __init__(self, weights: Path, threads: int | None = None) -> None:
        try:
            import torch

            from detr.models import load_model
        except ModuleNotFoundError as error:
            raise missing_extra(error, "the torch engine") from error
        self._torch = torch
        self._threads = threads
        detector, self.info = load_model(weights)
        self.detector = detector.eval()
        self.artifact = weights_file(weights)
        self.versions = {"torch": torch.__version__}
        self.batch_size = None

    def on_canvas(self, canvas: tuple[int, int]) -> TorchEngine:
        """The same engine on a fixed canvas (height, width), if it has none of its own."""
        placed = copy.copy(self)
        preprocess = self.info.preprocess.on(canvas)
        placed.info = self.info.model_copy(update={"preprocess": preprocess})
        return placed

    def _infer(self, inputs: Inputs) -> RawDetections:
        torch = self._torch
        with torch.inference_mode(), self._thread_count():
            outputs = self.detector(
                torch.from_numpy(inputs.images),
                torch.from_numpy(inputs.valid_sizes),
                torch.from_numpy(inputs.original_sizes),
            )
        return RawDetections.of([x.numpy() for x in outputs], inputs)

    @contextlib.contextmanager
    def _thread_count(self) -> Iterator[None]:
        if self._threads is None:
            yield
            return
        before = self._torch.get_num_threads()
        self._torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)


def weights_file(path: Path) -> Path:
    """The file with the weights of a checkpoint or a run directory."""
    return path / "model.safetensors" if path.is_dir() else path


def bundle_weights(bundle: Bundle) -> Path:
    """The checkpoint a bundle was exported from, if it is still the same.

    Raises:
        UserError: ``bundle-source`` where it is gone or has changed, or never was one.
    """
    source = bundle.info.source
    path = Path(source.path)
    if isinstance(bundle.info.model, AdoptedInfo):
        raise UserError(
            "bundle-source", f"{bundle.path}: was adopted from {path}, which is no checkpoint"
        )
    if not path.is_file():
        raise UserError(
            "bundle-source", f"{bundle.path}: its checkpoint {path} is gone; give the checkpoint"
        )
    if sha256(path) != source.sha256:
        raise UserError(
            "bundle-source", f"{bundle.path}: its checkpoint {path} has changed since the export"
        )
    return path
