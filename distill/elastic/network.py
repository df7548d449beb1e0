"""The models of an elastic training as views of one network, each with methods of its own.

A method is built for the pair it compares (layers are paired by depth), so every model has its own
two lists: towards the teacher and towards the largest. What methods bring along, such as adaptors,
is shared where it is alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detr.errors import UserError
from detr.models import Detector, Teacher
from detr.models.share import share_tensors, within
from distill.elastic.choices import Choice, Draw, Source, draws
from distill.methods import Method, build_methods, parse_methods
from distill.recipe import Recipe

Methods = list[Method[Any]]
# Encoder layers, decoder layers, queries: a canvas changes no weight.
_Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Member:
    """A model within the network.

    Attributes:
        detector: Shares its tensors with the trained one, or is it.
        methods: By whom it learns from.
    """

    detector: Detector
    methods: dict[Source, Methods]


@dataclass(frozen=True)
class Trained:
    """A model that a step trains.

    Attributes:
        draw: Which, why, and from whom it learns.
        detector: The model.
        methods: What is asked of it.
    """

    draw: Draw
    detector: Detector
    methods: Methods


class ElasticNetwork:
    """All models of an elastic training.

    Args:
        recipe: With a section ``elastic``.
        student: The trained detector, on its device and in training mode.
        teacher: What methods learn from, or ``None`` where none of them needs one.
        average: See :func:`build_methods`.
        drops: Steps at which the learning rate falls.

    Attributes:
        choices: From the smallest to the largest.
        largest: The trained detector in evaluation mode, as the smaller ones' teacher.

    Raises:
        UserError: What :func:`build_methods` raises, with the model it does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Detector,
        teacher: Teacher | None,
        average: Teacher | None,
        drops: Sequence[int],
    ) -> None:
        assert recipe.elastic is not None
        self.recipe, self._drops = recipe, drops
        self.choices = recipe.elastic.choices(student.config, recipe.input)
        self._self_taught = any(k.teacher != "none" for k, _ in parse_methods(recipe.methods))
        whole = _shape(self.choices[-1])
        self.largest = within(student, *whole).eval()
        self._members: dict[_Shape, Member] = {
            whole: Member(student, {"teacher": self._methods("largest", student, teacher, average)})
        }
        first: dict[Source, Methods] = {"teacher": self._members[whole].methods["teacher"]}
        for choice in self.choices:
            if _shape(choice) in self._members:
                continue
            member = Member(within(student, *_shape(choice)), {})
            for source, *models in self._sources(teacher, average):
                methods = self._methods(choice.name, member.detector, *models)
                alike = first.setdefault(source, methods)
                for method, other in zip(methods, alike, strict=True):
                    share_tensors(method, other)
                member.methods[source] = methods
            self._members[_shape(choice)] = member

    def _sources(
        self, teacher: Teacher | None, average: Teacher | None
    ) -> Iterator[tuple[Source, Teacher | None, Teacher | None]]:
        yield "teacher", teacher, average
        if self._self_taught:
            yield "largest", self.largest, None

    def _methods(
        self, name: str, detector: Detector, teacher: Teacher | None, average: Teacher | None
    ) -> Methods:
        try:
            return build_methods(
                self.recipe.methods,
                detector,
                teacher,
                average=average,
                loss=self.recipe.loss,
                steps=self.recipe.steps,
                drops=self._drops,
                preprocess=self.recipe.input,
            )
        except UserError as error:
            raise UserError(error.code, f"{error.message} (elastic: {name})") from error

    @property
    def methods(self) -> Methods:
        """All methods of all models, those of the largest first."""
        members = self._members.values()
        return [x for member in members for methods in member.methods.values() for x in methods]

    def trained(self, index: int) -> list[Trained]:
        """The models that a step trains, the largest first."""
        assert self.recipe.elastic is not None
        count, seed = self.recipe.elastic.drawn, self.recipe.seed
        found = []
        for draw in draws(self.choices, count, seed, index):
            member = self._members[_shape(draw.choice)]
            source: Source = draw.source if draw.source in member.methods else "teacher"
            used = Draw(draw.role, draw.choice, source)
            found.append(Trained(used, member.detector, member.methods[source]))
        return found


def _shape(choice: Choice) -> _Shape:
    return choice.encoder_layers, choice.decoder_layers, choice.queries
