"""Which models one training is to hold, and which of them a step trains.

Every step trains the largest and the smallest (the sandwich rule of Yu and Huang, Universally
Slimmable Networks, ICCV 2019, section 3.2) and some drawn ones, first of all a deep decoder on each
shallow encoder's memory and a shallow one on the deepest's. What is drawn is a pure function of
seed and step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from detr.config import DetectorConfig, Positive, Strict
from detr.data.preprocess import PreprocessConfig, Side

Source = Literal["teacher", "largest"]
Role = Literal["largest", "smallest", "drawn"]
Size = tuple[int, int]

# Tells these draws from others of the same seed and step.
_DRAW = 4


@dataclass(frozen=True)
class Choice:
    """One model of an elastic training.

    Attributes:
        encoder_layers, decoder_layers: The first ones of the trained detector.
        queries: The first ones, or the best where the encoder proposes them.
        size: Canvas (height, width); ``None`` where it follows the images.
    """

    encoder_layers: int
    decoder_layers: int
    queries: int
    size: Size | None

    @property
    def name(self) -> str:
        """``e1-d2-q40-72x240``: of files."""
        parts = [f"e{self.encoder_layers}", f"d{self.decoder_layers}", f"q{self.queries}"]
        return "-".join([*parts, *([] if self.size is None else ["{}x{}".format(*self.size)])])


@dataclass(frozen=True)
class Draw:
    """A model that a step trains.

    Attributes:
        role: Why.
        choice: Which.
        source: Whom it learns from, besides the labels.
    """

    role: Role
    choice: Choice
    source: Source


class ElasticRecipe(Strict):
    """The models that one training holds: every combination of what is listed.

    Lists ascend, and end with what the detector or the canvas is; one that is left out leaves no
    choice.

    Attributes:
        encoder_layers, decoder_layers: Depths.
        queries: Numbers of queries.
        sizes: Canvases (height, width).
        drawn: Models that a step trains besides the largest and the smallest; see :func:`draws`.
    """

    encoder_layers: tuple[Positive, ...] = ()
    decoder_layers: tuple[Positive, ...] = ()
    queries: tuple[Positive, ...] = ()
    sizes: tuple[tuple[Side, Side], ...] = ()
    drawn: Annotated[int, Field(ge=0, le=100)] = 1

    @field_validator("encoder_layers", "decoder_layers", "queries", "sizes")
    @classmethod
    def _ascending(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        # Canvases grow in neither side downwards.
        pairs = [v if isinstance(v, tuple) else (v,) for v in values]
        for low, high in itertools.pairwise(pairs):
            if low == high or any(a > b for a, b in zip(low, high, strict=True)):
                raise ValueError("is not ascending")
        return values

    def contradictions(self, detector: DetectorConfig, canvas: PreprocessConfig) -> Iterator[str]:
        """What does not fit the rest of a recipe, and why."""
        own = {
            "encoder_layers": (self.encoder_layers, detector.encoder.layers),
            "decoder_layers": (self.decoder_layers, detector.decoder.layers),
            "queries": (self.queries, detector.queries.number),
            "sizes": (self.sizes, canvas.size),
        }
        for key, (values, most) in own.items():
            if values and values[-1] != most:
                yield f"elastic.{key} ends with {values[-1]}, and the recipe's own is {most}"
        if len(self.encoder_layers) > 1 and not detector.encoder.nested:
            yield (
                "elastic.encoder_layers: what this encoder's layers give goes through more than "
                "layers before it is a memory, so fewer of them are no encoder; leave it out"
            )
        if len(self.choices(detector, canvas)) == 1:
            yield "elastic: lists nothing to choose between"

    def choices(self, detector: DetectorConfig, canvas: PreprocessConfig) -> list[Choice]:
        """Every combination; the first is the smallest, the last the largest."""
        return [
            Choice(*values)
            for values in itertools.product(
                self.encoder_layers or (detector.encoder.layers,),
                self.decoder_layers or (detector.decoder.layers,),
                self.queries or (detector.queries.number,),
                self.sizes or (canvas.size,),
            )
        ]


def draws(choices: Sequence[Choice], count: int, seed: int, index: int) -> list[Draw]:
    """The models that a step trains: the largest, the smallest, and others, each once.

    The others are, first, the deepest decoder on every memory (an encoder depth on a canvas) that
    no such decoder of the step reads yet: its every layer answers, and its first ones are the
    shallower decoders, while a memory teaches nothing to what does not read it. Next is the
    shallowest decoder on the largest model's memory, so that no corner of encoder depth and decoder
    depth is left to chance.

    The largest learns from the teacher; of the others each learns from the teacher or from the
    largest, either with the same chance, so that over a training it learns from both and a step
    costs no more than with one.

    Args:
        choices: All, from the smallest to the largest; at least two.
        count: How many others, or all there are.
        seed: Of the run.
        index: The step, from 0.
    """
    rng = np.random.default_rng((seed, _DRAW, index))
    smallest, *between, largest = choices
    left = [between[i] for i in rng.permutation(len(between))]
    corner = (*_memory(largest), smallest.decoder_layers)
    others: list[Choice] = []
    while left and len(others) < count:
        trained = {_depths(choice) for choice in (smallest, largest, *others)}
        missing = [choice for choice in left if _depths(choice) not in trained]
        deep = (one for one in missing if one.decoder_layers == largest.decoder_layers)
        shallow = (one for one in missing if _depths(one) == corner)
        choice = next(itertools.chain(deep, shallow, left))
        left.remove(choice)
        others.append(choice)
    wanted: list[tuple[Role, Choice]] = [("smallest", smallest)]
    wanted += [("drawn", choice) for choice in sorted(others, key=choices.index)]
    sources: tuple[Source, Source] = ("teacher", "largest")
    found = [Draw(role, choice, sources[rng.integers(2)]) for role, choice in wanted]
    return [Draw("largest", largest, "teacher"), *found]


def _memory(choice: Choice) -> tuple[int, Size | None]:
    """What a model's decoder reads."""
    return choice.encoder_layers, choice.size


def _depths(choice: Choice) -> tuple[int, Size | None, int]:
    """That, and how deep the decoder is."""
    return (*_memory(choice), choice.decoder_layers)
