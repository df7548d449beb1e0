"""The ``precision_report`` of ``bundle.json``: what was measured when it got its precision."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, Field

from detr.config import Record
from engines.parity import Measured, Outcome


class IslandTrial(Measured):
    """One island that was tried.

    Attributes:
        change: What was different from the best island so far.
        parts: How many parts the island had.
        outcome: How far it was from the float32 torch model.
        holds: Whether that is within the budget, that of AP included.
    """

    change: str
    parts: int
    outcome: Outcome
    holds: bool


class IslandSearch(Measured):
    """The search for the smallest float32 island that holds the budget.

    Attributes:
        island: Parts that compute in float32.
        trials: Every island tried, in order.
        complete: Whether every part was tried before the trials ran out.
    """

    island: tuple[str, ...]
    trials: tuple[IslandTrial, ...]
    complete: bool

    def table(self) -> str:
        """The trials for a person: what each group of parts is worth."""
        width = max(len(trial.change) for trial in self.trials)
        lines = [
            f"{trial.change:<{width}}  {'holds' if trial.holds else 'OVER '}  "
            f"{trial.outcome.summary()}"
            for trial in self.trials
        ]
        if not self.complete:
            lines.append("stopped at the last trial; parts not tried stay in the island")
        return "\n".join(lines)


class PrecisionRow(Measured):
    """One graph.

    Attributes:
        name: Its precision, and its island where there are several.
        ap: COCO AP, half precision and int8 computed as such; ``None`` without labels.
        violations: What exceeds the parity budget of its precision, against float32.
        cpu_ms: Median time of a run on this CPU, engine only, one batch.
        size_mb: Size of the graph with its weights, 10^6 bytes.
    """

    name: str
    ap: float | None
    violations: Annotated[
        tuple[str, ...], Field(validation_alias=AliasChoices("violations", "over"))
    ] = ()
    cpu_ms: float
    size_mb: float

    @property
    def precision(self) -> str:
        """The precision without its island."""
        return self.name.split()[0]


class PrecisionComparison(Measured):
    """One model in several precisions: what each costs and brings.

    Attributes:
        images: Images the comparison is over.
        batch: Images per timed run.
        engine: What ran for the times: the fastest engine for a CPU that is installed.
        rows: float32 first; the exported graph last.
        advice: The conclusion, one line each.
    """

    images: int
    batch: int
    engine: str
    rows: tuple[PrecisionRow, ...]
    advice: tuple[str, ...]

    def violations(self, name: str) -> tuple[str, ...]:
        """What of a row exceeds its budget."""
        return next(row.violations for row in self.rows if row.name == name)

    def table(self) -> str:
        """For a person."""
        first = self.rows[0]
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{'':<{width}}      AP  against fp32  budget    CPU ms     MB  ({self.images} images, "
            f"times in {self.engine})"
        ]
        for row in self.rows:
            ap, gap = "     –", "      –"
            if row.ap is not None and first.ap is not None:
                ap, gap = f"{row.ap:.4f}", f"{row.ap - first.ap:+.4f}"
            held = "over  " if row.violations else "holds "
            lines.append(
                f"{row.name:<{width}}  {ap}       {gap}  {held}  {row.cpu_ms:8.1f}  "
                f"{row.size_mb:5.1f}"
            )
        return "\n".join([*lines, *self.advice])


class PrecisionReport(Record):
    """What was measured on the way to a precision.

    Attributes:
        search: The search for the island, where there was one.
        comparison: The comparison with the other precisions, where there were images to compare on
            (``verdict`` in files of format 1).
    """

    search: IslandSearch | None = None
    comparison: Annotated[
        PrecisionComparison | None,
        Field(validation_alias=AliasChoices("comparison", "verdict")),
    ] = None

    def table(self) -> str:
        """For a person; empty where nothing was measured."""
        return "\n".join(
            part.table() for part in (self.search, self.comparison) if part is not None
        )
