"""What the parity gate says, as data and in words."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from detr.errors import GateError
from export.parity.compare import Budget, Parity
from export.parity.diagnose import Pitfall
from export.parity.first_deviation import Deviation

Status = Literal["accepted", "undecided", "rejected"]
Reference = Literal["torch", "golden", "onnxruntime"]

# From good to bad.
STATUSES: tuple[Status, ...] = ("accepted", "undecided", "rejected")


class EngineVerdict(BaseModel):
    """What the gate found about one engine.

    Attributes:
        engine: Its name.
        reference: What it was compared with: ``torch``, ``golden`` (torch's detections in the
            bundle) or ``onnxruntime``.
        samples: What images.
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
    status: Status = "accepted"
    reasons: list[str] = []
    notes: list[str] = []
    parity: Parity | None = None
    ap: float | None = None
    reference_ap: float | None = None
    images: list[str] = []
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


class GateVerdict(BaseModel):
    """What the gate found about a bundle.

    Attributes:
        bundle: Its path.
        precision: Of its graph.
        budget: What was allowed.
        engines: One entry per engine and set of images, ONNX Runtime first.
    """

    bundle: str
    precision: str
    budget: Budget
    engines: list[EngineVerdict]

    @property
    def worst(self) -> EngineVerdict:
        """The first of those with the worst status."""
        return max(self.engines, key=lambda engine: STATUSES.index(engine.status))

    @property
    def status(self) -> Status:
        """The worst of all engines."""
        return self.worst.status

    def text(self) -> str:
        """A report for the terminal."""
        head = f"{self.bundle} ({self.precision}): {self.status}"
        return "\n".join([head, *(engine.text() for engine in self.engines)])

    def check(self) -> None:
        """Lets an accepted bundle pass.

        Raises:
            GateError: ``parity-rejected`` or ``parity-undecided``, with everything in one line.
        """
        for engine in self.engines:
            if engine.status == "rejected":
                raise GateError("parity-rejected", f"{self.bundle}: {engine.complaint()}")
        for engine in self.engines:
            if engine.status == "undecided":
                raise GateError(
                    "parity-undecided", f"{self.bundle}: {engine.engine}: {engine.reasons[0]}"
                )
