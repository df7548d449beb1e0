"""Distillation methods, one file per paper, and how a recipe's ``methods`` become objects.

A method of one's own lives outside the package, see CONTRIBUTING.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from detr.config import Strict
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import Detector, Teacher
from distill.losses.weights import LossWeights
from distill.methods.base import IMAGENET, Method, Setting
from distill.methods.clockdistill import ClockDistill
from distill.methods.d3etr import D3etr
from distill.methods.defeat import Defeat
from distill.methods.detrdistill import DetrDistill
from distill.methods.fgd import Fgd
from distill.methods.fitnet import FitNet
from distill.methods.foundation import FoundationTeacher
from distill.methods.go_lsd import GoLsd, GoLsdTeacher
from distill.methods.kd_detr import KdDetr
from distill.methods.mgd import Mgd
from distill.methods.od_detr import OdDetr
from distill.methods.outside import SEPARATOR, load_method
from distill.methods.qskd import Qskd
from distill.methods.stable_dino import StableDino
from distill.methods.step import PairedGroup, PerStep, Step

METHODS: dict[str, type[Method[Any]]] = {
    ClockDistill.name: ClockDistill,
    KdDetr.name: KdDetr,
    D3etr.name: D3etr,
    Defeat.name: Defeat,
    DetrDistill.name: DetrDistill,
    FitNet.name: FitNet,
    Fgd.name: Fgd,
    FoundationTeacher.name: FoundationTeacher,
    GoLsd.name: GoLsd,
    GoLsdTeacher.name: GoLsdTeacher,
    Mgd.name: Mgd,
    OdDetr.name: OdDetr,
    Qskd.name: Qskd,
    StableDino.name: StableDino,
}

Specs = Sequence[Mapping[str, Mapping[str, Any]]]

__all__ = [
    "METHODS",
    "Method",
    "PairedGroup",
    "PerStep",
    "Setting",
    "Step",
    "build_methods",
    "find_method",
    "parse_methods",
]


def build_methods(
    specs: Specs,
    student: Detector,
    teacher: Teacher | None,
    *,
    average: Teacher | None = None,
    loss: LossWeights | None = None,
    steps: int = 0,
    drops: Sequence[int] = (),
    preprocess: PreprocessConfig = IMAGENET,
) -> list[Method[Any]]:
    """The methods of a recipe, with the modules they bring along on the student's device.

    Call it after the student and the teacher have their weights and before the optimizer is made.

    Args:
        specs: ``{name: options}`` each, in the recipe's order.
        student: The network to be trained.
        teacher: The frozen network, or ``None``.
        average: What methods whose ``teacher`` is ``ema`` learn from; ``teacher`` by default.
        loss: Weights of the detection loss; the defaults otherwise.
        steps: Length of the run.
        drops: Steps at which the learning rate falls.
        preprocess: How images are normalized.

    Raises:
        UserError: What :func:`parse_methods` raises, ``method-teacher`` where a method needs a
            teacher and there is none, ``method-scores`` for an architecture without what the method
            reads, or what a method raises for models it cannot pair.
    """
    parsed = parse_methods(specs)
    falls = tuple(sorted(drops))
    device = next(student.parameters()).device
    methods = []
    for kind, options in parsed:
        facts = [student.facts]
        own = teacher if kind.teacher != "ema" or average is None else average
        setting = Setting(student, own, loss or LossWeights(), steps, falls, preprocess)
        if kind.teacher != "none":
            if own is None:
                raise UserError("method-teacher", f"methods.{kind.name}: needs a teacher")
            _check_offers(kind, options, own)
            facts.append(own.facts)
        if kind.reads_scores and any(model.scores != "sigmoid" for model in facts):
            raise UserError(
                "method-scores",
                f"methods.{kind.name}: compares sigmoid scores; heads.classes: softmax has none",
            )
        methods.append(kind(options, setting).to(device))
    return methods


def _check_offers(kind: type[Method[Any]], options: Strict, teacher: Teacher) -> None:
    """Raises UserError ``method-teacher`` where the teacher does not offer what is needed."""
    missing = sorted(kind.needs(options) - teacher.offers)
    if missing:
        raise UserError(
            "method-teacher",
            f"methods.{kind.name}: needs the teacher's {', '.join(missing)}; a "
            f"{teacher.facts.family} teacher offers {', '.join(sorted(teacher.offers))} (other "
            "options may need less: docs/weights.md)",
        )


def parse_methods(specs: Specs) -> list[tuple[type[Method[Any]], Strict]]:
    """Names and options of methods, checked without any model.

    Raises:
        UserError: What :func:`find_method` raises, ``method-option`` (a misspelt option or a bad
            value), ``method-twice``, or ``method-conflict`` for two methods of which each wants to
            be the detection loss.
    """
    parsed = [
        (kind := find_method(name), _options(kind, options))
        for entry in specs
        for name, options in entry.items()
    ]
    kinds = [kind for kind, _ in parsed]
    for kind in kinds:
        if [other.name for other in kinds].count(kind.name) > 1:
            raise UserError("method-twice", f"methods: {kind.name} is listed twice")
    replacing = [kind.name for kind in kinds if kind.replaces_detection_loss]
    if len(replacing) > 1:
        names = " and ".join(replacing)
        raise UserError(
            "method-conflict", f"methods: {names} replace the detection loss; use one of them"
        )
    return parsed


def find_method(name: str) -> type[Method[Any]]:
    """The method of a name, or at a place outside the package (``module:Class``).

    Raises:
        UserError: ``method-unknown``, or what :func:`distill.methods.outside.load_method` raises.
    """
    if name in METHODS:
        return METHODS[name]
    if SEPARATOR in name:
        return load_method(name)
    near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(METHODS)}"
    hint += "; one of your own is module:Class"
    raise UserError("method-unknown", f"methods: no method {name!r}; {hint}")


def _options(kind: type[Method[Any]], options: Mapping[str, Any]) -> Strict:
    try:
        return kind.Options.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("methods", kind.name, *first["loc"]))
        if first["type"] != "extra_forbidden":
            message = first["msg"].removeprefix("Value error, ")
            raise UserError("method-option", f"{place}: {message}") from error
        known = list(kind.Options.model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UserError("method-option", f"{place}: no such option; {hint}") from error
