"""What the parity gate says of a bundle: the verdicts on its engines together."""

from __future__ import annotations

from collections.abc import Iterable

from detr.errors import GateError
from engines.parity import Budget, Measured
from engines.verdict import FROM_GOOD_TO_BAD, EngineVerdict, Status


def worst_verdict(verdicts: Iterable[EngineVerdict]) -> EngineVerdict:
    """The first of those with the worst status."""
    return max(verdicts, key=lambda verdict: FROM_GOOD_TO_BAD.index(verdict.status))


class GateVerdict(Measured):
    """What the gate says of a bundle.

    Attributes:
        bundle: Its path.
        precision: Of its graph.
        budget: What was allowed.
        engines: One verdict per engine and set of images, ONNX Runtime first.
    """

    bundle: str
    precision: str
    budget: Budget
    engines: tuple[EngineVerdict, ...]

    @property
    def worst(self) -> EngineVerdict:
        """The first of those with the worst status."""
        return worst_verdict(self.engines)

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
        worst = self.worst
        if worst.status == "rejected":
            raise GateError("parity-rejected", f"{self.bundle}: {worst.complaint()}")
        if worst.status == "undecided":
            raise GateError(
                "parity-undecided", f"{self.bundle}: {worst.engine}: {worst.reasons[0]}"
            )
