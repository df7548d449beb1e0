"""Which of several bundles is the best within a budget, and how the others did."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from bench.report.model import percent


class Candidate(BaseModel):
    """One bundle, as its row of the report says.

    Attributes:
        name: Unique among the candidates.
        artifact: Path as given on the command line.
        encoder_layers, decoder_layers: Of the model.
        ap: COCO AP, 0..1.
        min_ms, ms, p90_ms: Least, median and 90th percentile of the latency end to end.
        again: Those times are of a second measurement, in turns with its neighbours.
        within: The 90th percentile holds the budget.
        pareto: No other candidate is both faster (median) and more accurate.
    """

    name: str
    artifact: str
    encoder_layers: int | None
    decoder_layers: int | None
    ap: float
    min_ms: float
    ms: float
    p90_ms: float
    again: bool
    within: bool
    pareto: bool


class Fit(BaseModel):
    """A choice by budget.

    Attributes:
        format: Version of the JSON form.
        data: Data set as named on the command line.
        engine: Runtime.
        created: ISO 8601, UTC.
        budget_ms: Most milliseconds end to end for nine images of ten (p90).
        kept: Name of the best candidate that held the budget when timed again, or ``None``.
        candidates: Fastest first.
        skipped: What could not be measured, and why.
        commands: What to type to get this again.
    """

    format: Literal[1] = 1
    data: str
    engine: str
    created: str
    budget_ms: float
    kept: str | None
    candidates: list[Candidate]
    skipped: list[str]
    commands: list[str]

    @property
    def best(self) -> Candidate | None:
        """The candidate that is kept."""
        return next((c for c in self.candidates if c.name == self.kept), None)

    def text(self) -> str:
        """For the terminal: what is kept, and the front it was chosen from."""
        lines = [_line(c, "*" if c.within else " ") for c in self.candidates if c.pareto]
        lines.append(
            f"* within {self.budget_ms:g} ms (p90); the Pareto front of {len(self.candidates)} "
            f"candidates in {self.engine}"
        )
        lines += [
            f"{one.name}: not kept, p90 {one.p90_ms:.1f} ms when timed again"
            for one in self.candidates
            if one.again and not one.within
        ]
        lines += [f"not measured: {reason}" for reason in self.skipped]
        if (best := self.best) is not None:
            lines.append(
                f"kept {best.artifact}: {percent(best.ap)} AP, p90 {best.p90_ms:.1f} ms "
                "when timed again"
            )
        return "\n".join(lines)


def _line(candidate: Candidate, mark: str) -> str:
    return (
        f"{mark} {candidate.name}: {percent(candidate.ap)} AP, {candidate.ms:.1f} ms "
        f"(p90 {candidate.p90_ms:.1f})"
    )
