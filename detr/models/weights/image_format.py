"""How a Hugging Face folder's detector wants its images: ``preprocessor_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.weights.folder import read_document

FILE = "preprocessor_config.json"
# COCO detectors' own size: the short side, and the long one at most.
PUBLISHED = PreprocessConfig(short=800, long=1333)


def read_image_format(
    folder: Path, canvas: tuple[int, int] | None = None, usual: PreprocessConfig = PUBLISHED
) -> PreprocessConfig:
    """Size, mean and standard deviation that a folder asks for.

    Args:
        folder: Of the model.
        canvas: (height, width) that images are fitted to instead of its size.
        usual: Its family's, where it says nothing.

    Raises:
        UserError: ``weights-input`` for what our preprocessing does not do, and
            ``weights-source`` for a file that is not JSON.
    """
    path = folder / FILE
    if not path.exists():
        if canvas is None:
            return usual
        return PreprocessConfig(size=canvas, mean=usual.mean, std=usual.std)
    told = read_document(path)
    try:
        size = _size(told, path) if canvas is None else {"size": canvas}
        return PreprocessConfig(**size, **_normalization(told))
    except (TypeError, ValueError, KeyError, ValidationError) as error:
        line = str(error).splitlines()[0]
        raise UserError("weights-input", f"{path}: no usable size, mean and std: {line}") from error


def _size(told: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The size in the words of :class:`PreprocessConfig`."""
    size = told.get("size", {"shortest_edge": PUBLISHED.short, "longest_edge": PUBLISHED.long})
    if not isinstance(size, dict):
        # Before transformers 4.26.
        size = {"shortest_edge": size, "longest_edge": told.get("max_size", PUBLISHED.long)}
    given = {key for key, value in size.items() if value is not None}
    if not told.get("do_resize", True):
        problem = "images are taken in their own size (do_resize: false)"
    elif told.get("resample", 2) != 2:
        problem = f"images are not scaled bilinearly (resample: {told['resample']})"
    elif "shortest_edge" in given and given <= {"shortest_edge", "longest_edge"}:
        long = size.get("longest_edge") or told.get("max_size", PUBLISHED.long)
        return {"short": size["shortest_edge"], "long": long}
    elif given == {"max_height", "max_width"}:
        return {"size": (size["max_height"], size["max_width"])}
    else:
        problem = f"images are scaled without keeping their aspect (size: {size})"
    raise UserError("weights-input", f"{path}: {problem}; give the canvas with --size")


def _normalization(told: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation in units of 0..255."""
    unit = 1 / float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
    if not told.get("do_normalize", True):
        return {"mean": (0.0, 0.0, 0.0), "std": (unit, unit, unit)}
    return {
        # Products such as 57.120000000000005 are meant as they read in decimals.
        name: tuple(round(float(x) * unit, 9) for x in told[f"image_{name}"])
        for name in ("mean", "std")
        if told.get(f"image_{name}") is not None
    }
