"""The loop of ``detr predict``: decode ahead, answer, hand on; nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from detr.ahead import ahead
from detr.cli_support import counted, progress
from detr.errors import UserError
from detr.types import Detections
from engines.base import Engine
from engines.predict.sources import Frame, Skipped, Source, read_frames

# Images decoded before they are asked for: one being answered and a few against a slow file.
_AHEAD = 4


@dataclass(frozen=True)
class Answer:
    """What was found in an image, best first, whatever its score."""

    frame: Frame
    found: Detections


def answers(engine: Engine, sources: Sequence[Source]) -> Iterator[Answer | Skipped]:
    """Runs an engine over images and videos, in memory that does not grow with their number.

    An engine of a static batch gets full batches, as far as there are images.

    Args:
        engine: Any.
        sources: Images and videos, answered in their order; a file that cannot be read comes out
            before the images of the batch it would have been in.
    """
    size = engine.batch_size or 1
    batch: list[Frame] = []
    counts = [source.frames for source in sources]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    read = ahead(read_frames(sources, engine.info.preprocess.range), max(_AHEAD, size))
    for item in progress(read, "predict", total):
        if isinstance(item, Skipped):
            yield item
            continue
        batch.append(item)
        if len(batch) == size:
            yield from _answered(engine, batch)
            batch = []
    if batch:
        yield from _answered(engine, batch)


def _answered(engine: Engine, batch: Sequence[Frame]) -> Iterator[Answer]:
    found = engine([frame.pixels for frame in batch])
    for frame, detections in zip(batch, found, strict=True):
        yield Answer(frame, detections)


class SkipLimit:
    """How many files may be skipped.

    Args:
        most: More than these end the call.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.skipped: list[Skipped] = []

    def add(self, skipped: Skipped) -> None:
        """Counts one.

        Raises:
            UserError: ``predict-skipped`` where it is one too many.
        """
        self.skipped.append(skipped)
        if len(self.skipped) > self._most:
            raise UserError(
                "predict-skipped",
                f"{counted(len(self.skipped), 'file')} could not be read, --max-skipped allows "
                f"{self._most}; the answers so far are kept",
            )

    def check_answered(self, images: int) -> None:
        """Ends in an error where there is no answer at all.

        Raises:
            UserError: The first file's own.
        """
        if images or not self.skipped:
            return
        first, rest = self.skipped[0], len(self.skipped) - 1
        more = f"; {counted(rest, 'more file')} could not be read either" if rest else ""
        raise UserError(first.code, f"{first.path}: {first.message}{more}")
