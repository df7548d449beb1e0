"""What the parity gate says of one engine: the verdict that ``evidence.json`` keeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from detr.config import Record
from engines.parity import Budget, Figure, Measured, Parity

Status = Literal["accepted", "undecided", "rejected"]
FROM_GOOD_TO_BAD: tuple[Status, ...] = ("accepted", "undecided", "rejected")
Reference = Literal["torch", "golden", "onnxruntime", "original"]

# inputs: the network is fed something else; inputs-channels: in reverse channel order; batch: wrong
# at another batch size only; not-finite: NaN or infinity among the detections; classes, boxes,
# scores: this differs and the other two hardly do; masks: they alone differ;
# missing: far more are gone than are new.
Symptom = Literal[
    "inputs",
    "inputs-channels",
    "batch",
    "not-finite",
    "classes",
    "boxes",
    "scores",
    "masks",
    "missing",
]
# Whether the deviation begins within one layer, or perhaps in what feeds it.
Place = Literal["", "alone", "feeding"]


class Conditions(Record):
    """When a mistake is recognized; a condition that is empty always holds.

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

    def count(self) -> int:
        """How many conditions there are: the more, the more certain the diagnosis."""
        return sum(map(bool, self.model_dump().values()))


class Pitfall(Record):
    """One known mistake.

    Attributes:
        id: Stable name.
        when: When it is recognized.
        what: What it usually is, one sentence.
        instead: What to do.
        link: Where it was reported.
        island: Kinds of parts that, in half precision, are where it happens; the remedy is then to
            compute them in float32.
    """

    id: str
    when: Conditions
    what: str
    instead: str
    link: str
    island: tuple[str, ...] = ()

    def text(self) -> str:
        """One line."""
        return f"{self.what}; {self.instead} ({self.link})"


class Deviation(Measured):
    """The first layer whose result is not the reference's.

    Attributes:
        layer: Module as torch names it (``decoder.layers.1.cross_attention``); ``decode`` is what
            follows the last module, ``preprocessing`` what comes before the graph. Empty where no
            single layer stands out.
        operators: Operator types in the stretch the deviation comes from.
        outside: Whether the stretch has operators outside the layer, too: then what feeds the layer
            may be wrong, and not the layer.
        error: Difference (see :mod:`export.parity.first_deviation`) over the root mean square of
            what is expected.
        before: The same, the most of what comes before.
        compared: Number of intermediate values compared.
    """

    layer: str
    operators: tuple[str, ...] = ()
    outside: bool = False
    error: Figure = 0.0
    before: Figure = 0.0
    compared: int = 0

    def text(self) -> str:
        """One phrase."""
        if self.layer == "preprocessing":
            return "preprocessing: the network is given other inputs than the reference"
        if not self.layer:
            return (
                f"no layer stands out: differences grow to {self.error:.2g} of a value over "
                f"{self.compared} layers"
            )
        if self.layer == "decode":
            return (
                f"all {self.compared} layers agree (within {self.before:.1g}); what differs is the "
                "decoding of logits and boxes behind them"
            )
        feeding = " or what feeds it" if self.outside else ""
        return (
            f"{self.layer}{feeding} ({', '.join(self.operators[:6])}) differs by {self.error:.2g} "
            f"of its magnitude, the {self.compared - 1} layers before by at most {self.before:.1g}"
        )


def _stored_budget(value: Any) -> Any:
    """A budget of format 1, where null stands for an infinite one."""
    if not isinstance(value, dict):
        return value
    return {name: float("inf") if x is None else x for name, x in value.items()}


class EngineVerdict(Measured):
    """What the gate found about one engine.

    Attributes:
        engine: Its name.
        reference: What it was compared with: ``torch``, ``golden`` (torch's detections in the
            bundle) or ``onnxruntime``.
        samples: What images.
        budget: What was allowed.
        status: ``undecided`` where the reference finds too little to judge by.
        reasons: What is over the budget, or why nothing can be said; empty where accepted.
        notes: What a reader should know besides.
        parity: The comparison; ``None`` where the engine did not run.
        ap, reference_ap: COCO AP of both, where the images have labels.
        images: Names of the images that deviate most, worst first.
        deviation: The first layer to differ, where it could be looked for.
        pitfall: The known mistake it looks like.
    """

    engine: str
    reference: Reference
    samples: str
    budget: Annotated[Budget, BeforeValidator(_stored_budget)]
    status: Status = "accepted"
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parity: Parity | None = None
    ap: float | None = None
    reference_ap: float | None = None
    images: tuple[str, ...] = ()
    deviation: Deviation | None = None
    pitfall: Pitfall | None = None

    def text(self) -> str:
        """A few lines."""
        lines = [f"{self.engine} against {self.reference}, {self.samples}: {self.status}"]
        if self.parity is not None:
            lines.append(f"  {self.parity.summary()}")
        if self.ap is not None and self.reference_ap is not None:
            lines.append(f"  AP {100 * self.ap:.2f} against {100 * self.reference_ap:.2f}")
        over = self.status == "rejected" and self.parity is not None
        lines += [f"  {'over budget: ' if over else ''}{reason}" for reason in self.reasons]
        if self.images:
            lines.append(f"  worst images: {', '.join(self.images)}")
        if self.deviation is not None:
            lines.append(f"  first deviation: {self.deviation.text()}")
        if self.pitfall is not None:
            lines.append(f"  looks like: {self.pitfall.text()}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def complaint(self) -> str:
        """Everything about a rejection in one line."""
        parts = [
            f"{self.engine} does not find what {self.reference} finds on {self.samples}: "
            + ", ".join(self.reasons)
        ]
        if self.images:
            parts.append(f"worst on {', '.join(self.images)}")
        if self.deviation is not None:
            parts.append(f"first deviation: {self.deviation.text()}")
        if self.pitfall is not None:
            parts.append(f"looks like: {self.pitfall.text()}")
        return "; ".join(parts)
