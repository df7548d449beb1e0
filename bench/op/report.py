"""What ``bench op`` reports: one operator's contenders, their times, memory and error."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from bench.machine.environment import Environment

DeviceType = Literal["cpu", "cuda"]
BASE = "torch grid_sample"


class OpRow(BaseModel):
    """One contender.

    Attributes:
        name: Contender.
        version: Runtime and version.
        forward_ms: Median of the forward calls.
        forward_best_ms: Fastest of them.
        both_ms: Median of forward plus backward; ``None`` where it has no backward.
        calls: Forward calls timed; on CUDA, replays of a graph of calls.
        extra_mb: Peak memory of a forward call above what was held before it, output included, MiB.
        error: Largest absolute difference from float64 on the checked queries.
        times_faster: ``BASE``'s forward time divided by this one's.
        times_faster_both: The same, forward plus backward.
        bandwidth: CUDA only: bytes of inputs and output, each counted once, per second, as a share
            of the measured copy bandwidth.
        skipped: Why it was not measured; all of the above are then ``None``.
    """

    name: str
    version: str | None = None
    forward_ms: float | None = None
    forward_best_ms: float | None = None
    both_ms: float | None = None
    calls: int | None = None
    extra_mb: float | None = None
    error: float | None = None
    times_faster: float | None = None
    times_faster_both: float | None = None
    bandwidth: float | None = None
    skipped: str | None = None


class OpReport(BaseModel):
    """All contenders on one problem, and the machine."""

    preset: str
    dtype: str
    device: DeviceType
    threads: int
    batch: int
    queries: int
    heads: int
    channels: int
    points: int
    levels: list[tuple[int, int]]
    output_mb: float
    rows: list[OpRow]
    environment: Environment

    def text(self) -> str:
        """A table for people."""
        head = ["", "forward ms", "x", "+ backward ms", "x", "extra MiB", "error"]
        table = [head, *(_cells(row) for row in self.rows if row.skipped is None)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            f"{self.preset}, {self.dtype}, {self.device}, {self.threads} threads: batch "
            f"{self.batch}, {self.queries} queries, {self.heads} heads x {self.channels}, "
            f"{self.points} points, levels "
            + " ".join(f"{height}x{width}" for height, width in self.levels)
            + f"; output {self.output_mb:.1f} MiB; x: times faster than {BASE}"
        ]
        for line in table:
            cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            lines.append("  ".join([line[0].ljust(widths[0]), *cells]))
        lines += [f"{row.name}: skipped, {row.skipped}" for row in self.rows if row.skipped]
        shares = [(row.name, row.bandwidth) for row in self.rows if row.bandwidth is not None]
        lines += [f"{name}: {100 * share:.0f} % of copy bandwidth" for name, share in shares]
        machine = self.environment.machine
        packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
        lines.append(f"{machine.cpu}, {machine.cores_usable} cores; {packages}")
        lines.append("; ".join([self.environment.run, *self.environment.reasons]))
        return "\n".join(lines)


def _cells(row: OpRow) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        row.name,
        number(row.forward_ms, ".2f"),
        number(row.times_faster, ".1f"),
        number(row.both_ms, ".2f"),
        number(row.times_faster_both, ".1f"),
        number(row.extra_mb, ".1f"),
        number(row.error, ".1e"),
    ]
