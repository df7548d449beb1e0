"""What a path is that was given for a model and is none; asked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from detr.cli_support import counted
from detr.data.images import SUFFIXES
from detr.errors import UserError

_WEIGHTS = "model.safetensors"


def check_checkpoint(path: Path) -> None:
    """Refuses what is neither a checkpoint nor a run directory, and says what it is and what helps.

    Args:
        path: Exists, and is no bundle.

    Raises:
        UserError: ``model-missing``, or ``model-sidecar`` for weights of another project.
    """
    if path.is_dir():
        if not (path / _WEIGHTS).is_file():
            raise UserError("model-missing", f"{path}: {_described(path)}")
        return
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        raise UserError("model-missing", f"{path}: is a graph; give the bundle's folder it lies in")
    if suffix in SUFFIXES:
        raise UserError("model-missing", f"{path}: is an image; the model comes first")
    if not path.with_suffix(".json").exists():
        raise UserError(
            "model-sidecar",
            f"{path}: no {path.stem}.json beside it; weights of another project become a model "
            f"with: detr weights import {path} --out {path.stem}.safetensors",
        )


def _described(folder: Path) -> str:
    """What a folder without a model holds."""
    if (folder / "recipe.yaml").is_file():
        return "a run directory without a model yet; the command that trains in it goes on"
    files = [file for file in folder.rglob("*") if file.is_file()]
    images = sum(file.suffix.lower() in SUFFIXES for file in files)
    if images:
        return f"a folder with {counted(images, 'image')}, no model; the model comes first"
    if not files:
        return "an empty folder, no model"
    return f"no model among its {counted(len(files), 'file')} (no bundle.json, no {_WEIGHTS})"
