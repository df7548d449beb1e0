"""Batches of an elastic training: the same images once for every canvas that a step uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.data.batches import Batch, Batches
from distill.elastic.choices import Choice, draws


class ElasticBatches(Batches):
    """Batches with those of the smaller canvases beside them.

    A canvas sees the image a training of its own would see: the same random numbers, another size.

    Args:
        choices: All models.
        drawn: How many a step draws.
        args, kwargs: See :class:`Batches`; the canvas is the largest.
    """

    def __init__(self, choices: Sequence[Choice], drawn: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choices, self._drawn = choices, drawn

    def batch(self, step: int) -> Batch:
        """See the base class."""
        whole = super().batch(step)
        used = draws(self._choices, self._drawn, self.seed, step)
        for size in dict.fromkeys(draw.choice.size for draw in used):
            if size is not None and size != self.preprocess.size:
                canvas = self.preprocess.model_copy(update={"size": size})
                whole.smaller[size] = self.on(canvas, step)
        return whole
