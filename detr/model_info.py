"""The sidecar of a set of weights: everything needed to use them, readable without torch.

``NAME.safetensors`` holds tensors; ``NAME.json`` beside it holds a :class:`ModelInfo`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from detr.config import ClassMap, DetectorConfig, Strict
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.points import Points
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

    @property
    def nms(self) -> float | None:
        """Overlap above which a detection drops a worse one of its class, after the graph."""
        return self.detector.nms

    @property
    def depth(self) -> tuple[int | None, int | None]:
        """Layers of encoder and decoder, where they are known."""
        return self.detector.encoder.layers, self.detector.decoder.answering_layers

    @property
    def attention_sizes(self) -> tuple[int, int, Points]:
        """Heads, channels of a head, and points per level of every deformable attention."""
        return self.detector.attention_sizes

    @property
    def detections(self) -> int:
        """Detections per image at most."""
        return self.detector.detections

    @property
    def most_objects(self) -> int:
        """Objects it can find in an image: a query finds one."""
        return min(self.detector.detections, self.detector.queries.total)

    @model_validator(mode="before")
    @classmethod
    def _of_this_format(cls, content: Any) -> Any:
        return upgraded(content)


class AdoptedInfo(Strict):
    """The same of a graph that somebody else exported, as far as it can be known.

    Attributes:
        classes: Index to name and category id.
        preprocess: What an image must go through first.
        attention: Heads, channels of a head, and points per level of its deformable attentions;
            ``None`` without any.
        detections: Detections per image.
        provenance: Free-form facts.
    """

    classes: ClassMap
    preprocess: PreprocessConfig
    attention: tuple[int, int, Points] | None
    detections: int
    provenance: dict[str, Any] = {}

    @property
    def most_objects(self) -> int:
        """Objects it can find in an image, as far as its outputs tell."""
        return self.detections

    @property
    def nms(self) -> None:
        """Its detections are final."""

    @property
    def depth(self) -> tuple[int | None, int | None]:
        """Nobody counted its layers."""
        return None, None

    @property
    def attention_sizes(self) -> tuple[int, int, Points]:
        """See :attr:`ModelInfo.attention_sizes`.

        Raises:
            ValueError: Without deformable attention.
        """
        if self.attention is None:
            raise ValueError("a graph without deformable attention")
        return self.attention


def _info_class(content: Any) -> str:
    adopted = isinstance(content, AdoptedInfo) or (
        isinstance(content, dict) and "attention" in content
    )
    return "AdoptedInfo" if adopted else "ModelInfo"


# Of a bundle: of our own detectors, or of a graph that was adopted.
BundledInfo = Annotated[
    Annotated[ModelInfo, Tag("ModelInfo")] | Annotated[AdoptedInfo, Tag("AdoptedInfo")],
    Discriminator(_info_class),
]


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
