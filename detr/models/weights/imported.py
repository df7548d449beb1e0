"""What an import of published weights gives."""

from __future__ import annotations

from typing import NamedTuple

from detr.data.preprocess import PreprocessConfig
from detr.models.detector import Detector

# DETR's evaluation, and everyone's after it until RT-DETR.
USUAL_INPUT = PreprocessConfig(size=(800, 1333))


class Imported(NamedTuple):
    """A detector with published weights.

    Attributes:
        detector: In evaluation mode.
        names: Class names by index.
        unused: Published tensors that were not needed, with the reason.
        preprocess: What its images went through in training, as far as we know it.
    """

    detector: Detector
    names: tuple[str, ...]
    unused: dict[str, str]
    preprocess: PreprocessConfig = USUAL_INPUT
