"""What an import of published weights gives."""

from __future__ import annotations

from typing import NamedTuple

from detr.config import DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.models.checkpoint import headless
from detr.models.detector import Detector, build_detector
from detr.models.parts import BOX_HEADS, CLASS_HEADS, LABELS
from detr.models.tensors import match_tensors
from detr.models.weights.image_format import PUBLISHED
from detr.models.weights.renaming import Renamed


class Imported(NamedTuple):
    """A detector with published weights.

    Attributes:
        detector: In evaluation mode.
        names: Class names by index.
        unused: Published tensors that were not needed, with the reason.
        notes: What was decided on the way that names and shapes alone do not show.
        preprocess: How it wants its images.
        without: Tensors of heads that were cut off; the detector's are random there.
        family: Whose reader it was, as :data:`detr.models.weights.licenses.LICENSES` names them.
    """

    detector: Detector
    names: tuple[str, ...]
    unused: dict[str, str]
    notes: tuple[str, ...] = ()
    preprocess: PreprocessConfig = PUBLISHED
    without: frozenset[str] = frozenset()
    family: str = ""


def imported(
    config: DetectorConfig,
    renamed: Renamed,
    names: tuple[str, ...],
    place: str,
    notes: tuple[str, ...] = (),
) -> Imported:
    """A detector filled with tensors; all its class heads may have been cut off, or all its heads.

    Args:
        config: The detector.
        renamed: Its tensors.
        names: Class names by index.
        place: The source, for messages.
        notes: See :class:`Imported`.

    Raises:
        UserError: What :func:`detr.models.tensors.match_tensors` raises.
    """
    detector = build_detector(config, pretrained=False)
    own, tensors = detector.state_dict(), dict(renamed.tensors)
    without: frozenset[str] = frozenset()
    if headless(tensors):
        without = frozenset(n for n in own if CLASS_HEADS.match(n) or n == LABELS) - tensors.keys()
        if not any(BOX_HEADS.match(name) for name in tensors):
            without |= {name for name in own if BOX_HEADS.match(name)}
        tensors |= {name: own[name] for name in without}
        notes = (*notes, "no class head: it can be the start of a training and predicts nothing")
    match_tensors(detector, tensors, place)
    return Imported(detector.eval(), names, renamed.unused, notes, without=without)
