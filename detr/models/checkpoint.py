"""Weights on disk: ``NAME.safetensors`` and its sidecar ``NAME.json``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from detr.errors import UserError
from detr.files import write_atomic
from detr.model_info import ModelInfo, read_model_info
from detr.models.detector import Detector, build_detector
from detr.models.parts import CLASS_HEADS
from detr.models.tensors import match_tensors, read_tensors

WEIGHTS = "model.safetensors"


def save_model(
    path: Path,
    detector: Detector,
    info: ModelInfo,
    half: bool = False,
    without: Collection[str] = (),
) -> None:
    """Writes weights and sidecar, each in one step: a failure leaves the old file whole.

    Args:
        path: ``X.safetensors``, or a folder, which gets ``model.safetensors``.
        detector: Any device.
        info: Its config must be the detector's.
        half: Store parameters in 16 bits; buffers (batch-norm statistics) keep 32.
        without: Tensors that are left out, such as class heads that nobody trained.

    Raises:
        UserError: ``output-unwritable`` or ``disk-full``.
        ValueError: Where ``info`` describes another architecture.
    """
    if info.detector != detector.config:
        raise ValueError("info.detector is not the config of the detector that is saved")
    path = path if path.suffix == ".safetensors" else path / WEIGHTS
    parameters = dict(detector.named_parameters())
    tensors = {
        name: _stored(x, half and name in parameters)
        for name, x in detector.state_dict().items()
        if name not in without
    }
    write_atomic(path, save(tensors))
    save_info(path, info)


def save_info(path: Path, info: ModelInfo) -> None:
    """Replaces the sidecar of weights that are there.

    Args:
        path: ``X.safetensors``.
        info: What the sidecar is to say.

    Raises:
        UserError: ``output-unwritable`` or ``disk-full``.
    """
    write_atomic(path.with_suffix(".json"), info.model_dump_json(indent=2) + "\n")


def weights_file(path: Path) -> Path:
    """The file of weights at a path: itself, or that of a folder.

    Raises:
        UserError: ``checkpoint-missing``.
    """
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise UserError("checkpoint-missing", f"{path}: no such file")
    return path


def load_model(path: Path) -> tuple[Detector, ModelInfo]:
    """A detector in evaluation mode, on the CPU, in single precision.

    Args:
        path: ``X.safetensors`` (or a tensors-only ``X.pt``) with ``X.json`` beside it, or a folder
            with ``model.safetensors`` and ``model.json``.

    Raises:
        UserError: ``checkpoint-missing``, ``checkpoint-unreadable``, ``checkpoint-pickle``,
            ``checkpoint-headless``, ``checkpoint-mismatch``, ``checkpoint-nonfinite`` or
            ``model-sidecar``.
    """
    path = weights_file(path)
    # Before the sidecar: what is wrong with the weights is the more telling message.
    tensors = read_tensors(path)
    info = read_model_info(path.with_suffix(".json"))
    if headless(tensors):
        raise UserError(
            "checkpoint-headless",
            f"{path}: has no class head and predicts nothing; it can be the start of a training "
            "(start: in a recipe)",
        )
    detector = build_detector(info.detector, pretrained=False)
    match_tensors(detector, tensors, str(path))
    return detector.eval(), info


def headless(tensors: Collection[str]) -> bool:
    """Whether a detector's tensors, by name, lack every class head."""
    ours = any(name.startswith("decoder.") for name in tensors)
    return ours and not any(CLASS_HEADS.match(name) for name in tensors)


def _stored(x: Tensor, half: bool) -> Tensor:
    """A tensor as it goes to disk; one that 16 bits cannot hold stays as it is."""
    x = x.detach().to("cpu").contiguous()
    if not half:
        return x
    rounded = x.to(torch.float16)
    return rounded if bool(rounded.isfinite().all()) else x
