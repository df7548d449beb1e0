"""What several reports say together, as a model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from bench.report.model import percent
from detr.cli_support import counted

LEVEL = 0.05

Quantity = Literal["AP", "latency"]


class Entry(BaseModel):
    """One artifact on one machine, or several trainings of it, over all their runs.

    Attributes:
        name: Unique in the comparison.
        engine, precision, encoder_layers, decoder_layers: As in the rows.
        machine: Letter of the machine.
        runs: Measurements.
        trainings: Different weights among them.
        clean: Runs whose clocks were certified.
        ap, ap_low, ap_high: Mean, least and most over the trainings, 0..1.
        ms, ms_low, ms_high: Median, least and most of the runs' median end-to-end latency.
        p90_ms: Median of the runs' 90th percentiles, end to end.
        engine_ms: Median of the runs' median engine-only latency.
        size_mb: Of the first artifact.
        pareto: No other entry of its machine is both faster and more accurate.
    """

    name: str
    engine: str
    precision: str
    encoder_layers: int | None
    decoder_layers: int | None
    machine: str
    runs: int
    trainings: int
    clean: int
    ap: float
    ap_low: float
    ap_high: float
    ms: float
    ms_low: float
    ms_high: float
    p90_ms: float
    engine_ms: float
    size_mb: float
    pareto: bool = False


class Difference(BaseModel):
    """A test between two entries.

    Attributes:
        entry, reference: Their names.
        quantity: What is compared.
        value, low, high: AP: difference, 0..1. Latency: how many times faster than the reference.
            With the 95 % interval.
        p: Of the test, corrected for the number of tests of this quantity.
        method: The test, and what it repeats.
        scope: What the claim reaches.
        significant: ``p`` is below 0.05 and the scope is not a single run.
    """

    entry: str
    reference: str
    quantity: Quantity
    value: float
    low: float
    high: float
    p: float
    method: str
    scope: str
    significant: bool

    def sentence(self) -> str:
        """For a person."""
        if self.quantity == "AP":
            what = (
                f"{100 * self.value:+.1f} AP ({100 * self.low:+.1f} to {100 * self.high:+.1f}) "
                f"against {self.reference}"
            )
        else:
            span = f"{self.low:.3g} to {self.high:.3g}"
            what = f"{self.value:.3g}× the speed of {self.reference} ({span})"
        verdict = "" if self.significant else ", not shown to differ"
        if not self.significant and self.p < LEVEL:
            verdict = ", not claimable"
        return f"{self.entry}: {what}{verdict}; p = {self.p:.2g}, {self.method}, {self.scope}"


class ReportComparison(BaseModel):
    """What several reports say together.

    Attributes:
        format: Version of the JSON form.
        created: ISO 8601, UTC.
        sources: Report files, in the order given.
        data: Data set as the first report names it.
        images, boxes: AP was measured on so many.
        reference: Name of the entry the others are tested against.
        machines: Letter to description.
        entries: The most accurate first.
        differences: Tests against the reference, of latency on each machine.
        notes: What cannot be claimed and why.
    """

    format: int = 1
    created: str
    sources: list[str]
    data: str
    images: int
    boxes: int
    reference: str
    machines: dict[str, str]
    entries: list[Entry]
    differences: list[Difference]
    notes: list[str]

    def text(self) -> str:
        """For the terminal."""
        lines = []
        for entry in self.entries:
            front = "*" if entry.pareto else " "
            lines.append(
                f"{front} {entry.name}: {percent(entry.ap)} AP, {entry.ms:.2f} ms "
                f"(p90 {entry.p90_ms:.2f}), machine {entry.machine}, "
                f"{counted(entry.runs, 'run')} of {counted(entry.trainings, 'training')}"
            )
        lines.append("* on its machine's Pareto front")
        lines += [difference.sentence() for difference in self.differences]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
