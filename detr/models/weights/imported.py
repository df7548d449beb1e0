"""What an import of published weights gives."""

from __future__ import annotations

from typing import NamedTuple

from detr.models.detector import Detector


class Imported(NamedTuple):
    """A detector with published weights.

    Attributes:
        detector: In evaluation mode.
        names: Class names by index.
        unused: Published tensors that were not needed, with the reason.
    """

    detector: Detector
    names: tuple[str, ...]
    unused: dict[str, str]
