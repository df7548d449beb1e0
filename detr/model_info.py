"""The sidecar of a set of weights: everything needed to use them, readable without torch.

``NAME.safetensors`` holds tensors; ``NAME.json`` beside it holds a :class:`ModelInfo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from detr.config import ClassMap, DetectorConfig, Strict
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.sidecar import SidecarError, read_sidecar
from detr.upgrade import upgraded


class ModelInfo(Strict):
    """Architecture, classes and preprocessing of a set of weights, and where they came from.

    Attributes:
        format: Version of this sidecar; earlier ones are brought to it when they are read.
        detector: The architecture.
        classes: Index to name and category id.
        preprocess: What an image must go through first.
        provenance: Free-form facts (recipe, steps, AP, versions, teacher hash).
    """

    format: Literal[2] = 2
    detector: DetectorConfig
    classes: ClassMap
    preprocess: PreprocessConfig
    provenance: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_this_format(cls, content: Any) -> Any:
        return upgraded(content)


def read_model_info(path: Path) -> ModelInfo:
    """Reads a sidecar.

    Raises:
        UserError: ``model-sidecar`` where the file is missing, unreadable or not a sidecar.
    """
    if not path.exists():
        raise UserError(
            "model-sidecar",
            f"{path}: not there, and without it weights are no model; weights of another project "
            "become one with: detr weights import WEIGHTS --out NAME.safetensors",
        )
    try:
        return read_sidecar(path, ModelInfo)
    except SidecarError as error:
        raise UserError("model-sidecar", str(error)) from error
