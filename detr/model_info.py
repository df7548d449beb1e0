"""The sidecar of a set of weights: everything needed to use them, readable without torch.

``NAME.safetensors`` holds tensors; ``NAME.json`` beside it holds a :class:`ModelInfo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from detr.config import ClassMap, DetectorConfig, Strict
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError, first_problem


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
        return ModelInfo.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError("model-sidecar", f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise UserError("model-sidecar", f"{path}: {first_problem(error)}") from error
