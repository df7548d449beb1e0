"""The sidecar of a set of weights: everything needed to use them, readable without torch.

``NAME.safetensors`` holds tensors; ``NAME.json`` beside it holds a :class:`ModelInfo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detr.config import ClassMap, DetectorConfig, Strict
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.sidecar import SidecarError, read_sidecar


class ModelInfo(Strict):
    """Architecture, classes and preprocessing of a set of weights, and where they came from.

    Attributes:
        format: Version of this sidecar.
        detector: The architecture.
        classes: Index to name and category id.
        preprocess: What an image must go through first.
        provenance: Free-form facts (recipe, steps, AP, versions, teacher hash).
    """

    format: int = 1
    detector: DetectorConfig
    classes: ClassMap
    preprocess: PreprocessConfig
    provenance: dict[str, Any] = {}


def read_model_info(path: Path) -> ModelInfo:
    """Reads a sidecar.

    Raises:
        UserError: ``model-sidecar`` where the file is missing, unreadable or not a sidecar.
    """
    try:
        return read_sidecar(path, ModelInfo)
    except SidecarError as error:
        raise UserError("model-sidecar", str(error)) from error
