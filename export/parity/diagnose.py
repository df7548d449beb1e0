"""Which of the field's known mistakes a rejected export looks like.

The list is data (``known_pitfalls.yaml``): what must be seen, what it usually is, what to do,
and where it was reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml

from detr.config import Strict
from export.parity.first_deviation import Deviation

LIST = Path(__file__).parent / "known_pitfalls.yaml"

# inputs: the network is fed something else; inputs-channels: in reverse channel order; batch: wrong
# at another batch size only; not-finite: NaN or infinity among the detections; classes, boxes,
# scores: this differs and the other two hardly do; missing: far more are gone than are new.
Symptom = Literal[
    "inputs",
    "inputs-channels",
    "batch",
    "not-finite",
    "classes",
    "boxes",
    "scores",
    "missing",
]
# Whether the deviation begins within one layer, or perhaps in what feeds it.
Place = Literal["", "alone", "feeding"]


class When(Strict):
    """What must be seen; a condition that is empty always holds.

    Attributes:
        symptoms, operators, precisions, engines: Any of these.
        layer: A regular expression found in the name of the deviating layer.
        place: Where the deviation begins.
    """

    symptoms: tuple[Symptom, ...] = ()
    operators: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    layer: str = ""
    place: Place = ""

    def conditions(self) -> int:
        """How many conditions there are: the more, the more certain the diagnosis."""
        return sum(map(bool, self.model_dump().values()))


class Pitfall(Strict):
    """One known mistake.

    Attributes:
        id: Stable name.
        when: What must be seen.
        what: What it usually is, one sentence.
        instead: What to do.
        link: Where it was reported.
    """

    id: str
    when: When
    what: str
    instead: str
    link: str

    def text(self) -> str:
        """One line."""
        return f"{self.what}; {self.instead} ({self.link})"


def diagnose(
    symptoms: Collection[str],
    deviation: Deviation,
    operators: Collection[str],
    precision: str,
    engine: str,
) -> Pitfall | None:
    """The known mistake with the most conditions met, or ``None``.

    Args:
        symptoms: What is seen; see :data:`Symptom`.
        deviation: Where it begins.
        operators: Operator types in the stretch it begins in, function bodies included.
        precision: Of the graph.
        engine: Name of the engine.
    """
    layer = deviation.layer
    place: Place = ""
    if layer not in ("", "preprocessing", "decode"):
        place = "feeding" if deviation.outside else "alone"
    fitting = [
        pitfall
        for pitfall in known_pitfalls()
        if _any(pitfall.when.symptoms, symptoms)
        and _any(pitfall.when.operators, operators)
        and _any(pitfall.when.precisions, [precision])
        and _any(pitfall.when.engines, [engine])
        and pitfall.when.place in ("", place)
        and (not pitfall.when.layer or (layer and re.search(pitfall.when.layer, layer)))
    ]
    # What is seen says more than where it is seen.
    return max(fitting, key=lambda p: (bool(p.when.symptoms), p.when.conditions()), default=None)


def _any(wanted: Collection[str], seen: Collection[str]) -> bool:
    return not wanted or not set(wanted).isdisjoint(seen)


@lru_cache(maxsize=1)
def known_pitfalls() -> tuple[Pitfall, ...]:
    """The whole list."""
    entries = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return tuple(Pitfall.model_validate(entry) for entry in entries)
