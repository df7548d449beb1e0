"""The report: one model with one row per measured artifact; the pages made of it lie beside it."""

from __future__ import annotations

import csv
import io
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from bench.analysis.model import Analysis
from bench.latency import Latency
from bench.machine.clocks import ClockRange
from bench.machine.environment import Environment
from detr.metrics.coco_ap import CocoAp
from detr.metrics.kitti_ap import KittiAp

# From more artifacts on, the page tells of those that count and counts the others.
MANY = 8


class PerformanceBudget(BaseModel):
    """What an artifact must hold.

    Attributes:
        ms: Most milliseconds for the 90th percentile end to end: nine images of ten are in time.
        min_ap: Least COCO AP, 0..1.
    """

    ms: float | None = None
    min_ap: float | None = None

    def misses(self, row: ReportRow) -> list[str]:
        """What the row misses, one phrase each; empty where nothing is."""
        p90 = row.latency.end_to_end.p90_ms
        found = []
        # Written so that a NaN misses every budget.
        if self.ms is not None and not p90 <= self.ms:
            found.append(f"p90 end to end {p90:.4g} ms (at most {self.ms:g} ms)")
        if self.min_ap is not None and not row.coco.ap >= self.min_ap:
            found.append(f"AP {row.coco.ap:.4f} (at least {self.min_ap:g})")
        return found


class Speed(BaseModel):
    """How many times as fast as the report's reference, with its 95 % interval.

    Attributes:
        value: Ratio of the median end-to-end latencies.
        low, high: Interval over the turns the two took; other machines and days are not in it.
    """

    value: float
    low: float
    high: float

    def text(self) -> str:
        """``2.50 (2.46 – 2.53)``."""
        return f"{self.value:.2f} ({self.low:.2f} – {self.high:.2f})"


class ReportRow(BaseModel):
    """One artifact: what it is, how right it is and how fast, measured on the same file.

    Attributes:
        name: Short and unique in the report.
        engine: Runtime that ran it.
        precision: Of the artifact (``fp32``, ``fp16``, ``int8``).
        parity: What the parity gate says of this file in this engine, where it was asked.
        encoder_layers, decoder_layers: Of the model.
        parameters: Stored weights, where the format lets them be counted.
        size_mb: Of the artifact, 10^6 bytes.
        artifact: Path as given on the command line.
        sha256: Of the artifact.
        checkpoint_sha256: Of the trained weights it was made from: an engine built twice, or a
            bundle exported twice, is one training.
        coco: COCO AP on the report's data.
        kitti: KITTI AP, where the data is KITTI.
        masks: COCO AP of masks, where the artifact finds some and the data has them.
        latency: Engine only and end to end.
        threads: Of the engine, where the user said how many.
        speed: Relative to the reference, where both were timed in turns.
        analysis: Curves, confusions and slices.
        environment: Machine and clocks while this artifact was timed.
    """

    name: str
    engine: str
    precision: str
    parity: str | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    parameters: int | None = None
    size_mb: float
    # The key of the first release: old reports are compared with new ones for years.
    artifact: str = Field(
        validation_alias=AliasChoices("artefact", "artifact"), serialization_alias="artefact"
    )
    sha256: str
    checkpoint_sha256: str | None = None
    coco: CocoAp
    kitti: KittiAp | None = None
    masks: CocoAp | None = None
    latency: Latency
    threads: int | None = None
    speed: Speed | None = None
    analysis: Analysis | None = None
    environment: Environment

    @property
    def model(self) -> str:
        """The name without the engine, which a sweep adds to tell its rows apart."""
        return self.name.removesuffix(f" {self.engine}")

    @property
    def network(self) -> tuple[object, ...] | None:
        """The same for rows that differ in nothing but their weights; ``None`` where not known."""
        if self.parameters is None:
            return None
        layers = self.encoder_layers, self.decoder_layers
        return (self.engine, self.precision, self.parameters, *layers)

    @property
    def ms(self) -> float:
        """The figure compared everywhere: median end-to-end latency in milliseconds."""
        return self.latency.end_to_end.p50_ms


class Picture(BaseModel):
    """One drawing of an example image.

    Attributes:
        title: ``ground truth`` or the name of a row.
        boxes: Number of boxes drawn.
        uri: JPEG as a ``data:`` URI.
    """

    title: str
    boxes: int
    uri: str


class Example(BaseModel):
    """One image with its ground truth and what every artifact found in it."""

    title: str
    pictures: list[Picture]


class Report(BaseModel):
    """Accuracy and latency of artifacts on one data set.

    Attributes:
        format: Version of the JSON form.
        title: Heading.
        data: Data set as named on the command line.
        created: ISO 8601, UTC.
        reference: Name of the row the others are compared with.
        rows: One per artifact, in the order given.
        grid: Whether the rows are a sweep over depths, precisions and engines, shown as a table of
            them.
        skipped: What a sweep could not measure, and why.
        commands: What to type to get this report again.
        budget: What the rows were held against.
        score_threshold: Score from which a detection is drawn in the examples.
        truth_sha256: Fingerprint of the images and boxes AP was measured on.
        examples: Pictures; only in the HTML page, not in the JSON form.
        mistakes: The worst of each artifact; likewise.
        matches: Content of ``matches.npz``, the outcome of every detection, from which ``bench
            compare`` tells whether two APs differ; not in the JSON form.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    title: str = "Benchmark report"
    data: str
    created: str
    reference: str
    rows: list[ReportRow]
    grid: bool = False
    skipped: list[str] = []
    commands: list[str]
    budget: PerformanceBudget | None = None
    score_threshold: float = 0.3
    truth_sha256: str | None = None
    examples: list[Example] = []
    mistakes: list[Example] = []
    matches: bytes | None = Field(default=None, exclude=True, repr=False)

    def verdict(self) -> list[str]:
        """One sentence per artifact other than the reference, the most accurate first.

        Of many, those that nobody beats have one.

        The first also says how far above the same network, trained otherwise, it is. A report of a
        single artifact has one sentence about it.
        """
        base = next(row for row in self.rows if row.name == self.reference)
        others = [row for row in self.rows if row is not base]
        if not others:
            return [f"{base.name}: {percent(base.coco.ap)} AP at {base.ms:.1f} ms"]
        if len(self.rows) > MANY:
            front = {row.name for row in self.pareto()}
            others = [row for row in others if row.name in front] or others
        others = sorted(others, key=lambda row: -row.coco.ap)
        sentences = []
        for row in others:
            share = (
                f"{100 * row.coco.ap / base.coco.ap:.0f} % of {base.name}'s AP"
                if base.coco.ap > 0
                else f"no meaningful share of {base.name}'s AP"
            )
            times = f"{base.ms / row.ms:.3g}" if row.speed is None else row.speed.text()
            sentences.append(
                f"{row.name}: {percent(row.coco.ap)} AP at {row.ms:.1f} ms = {share} "
                f"({percent(base.coco.ap)}) at {times} times its speed ({base.ms:.1f} ms)"
            )
        best, *rest = others
        above = [
            f"{percent(best.coco.ap - row.coco.ap)} above {row.name}"
            for row in rest
            if best.network is not None and row.network == best.network
        ]
        if above:
            sentences[0] += f"; {' and '.join(above)}, the same network"
        return sentences

    def caveats(self) -> list[str]:
        """What a reader of the latencies must know first; empty where every run was clean."""
        said = {
            "disturbed": "the machine was not at rest (disturbed) while these were timed",
            "not certified": "not all clocks could be read (not certified) while these were timed",
        }
        lines = []
        for verdict, what in said.items():
            names = [row.name for row in self.rows if row.environment.run == verdict]
            if names:
                lines.append(f"{what}: {', '.join(names)}")
        return lines

    def notes(self) -> list[str]:
        """What a reader of the APs must know first."""
        return [note for note in dict.fromkeys(row.coco.note() for row in self.rows) if note]

    def misses(self) -> list[str]:
        """One phrase per artifact over the budget; empty where all hold it or there is none."""
        if self.budget is None:
            return []
        found = {row.name: self.budget.misses(row) for row in self.rows}
        return [f"{name}: {', '.join(phrases)}" for name, phrases in found.items() if phrases]

    def told_misses(self) -> list[str]:
        """:meth:`misses` for reading: of many artifacts, how many miss, and who holds."""
        missed = self.misses()
        if len(self.rows) <= MANY or not missed:
            return missed
        assert self.budget is not None
        held = [row.name for row in self.rows if not self.budget.misses(row)]
        return [f"{len(missed)} of {len(self.rows)}; held by {', '.join(held) or 'none'}"]

    def pareto(self) -> list[ReportRow]:
        """The rows no other row beats in both AP and latency, fastest first."""
        return sorted(
            (r for r in self.rows if not any(_dominates(other, r) for other in self.rows)),
            key=lambda row: (row.ms, row.name),
        )

    def class_names(self) -> list[str]:
        """Classes that have ground truth, in the order of the class list."""
        names: dict[str, None] = {}
        for row in self.rows:
            names.update((n, None) for n, c in row.coco.per_class.items() if c.count)
        return list(names)

    def kitti_classes(self) -> list[str]:
        """Classes with KITTI AP."""
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(row.kitti.per_class if row.kitti else ()))
        return list(names)

    def to_json(self) -> str:
        """Everything but the pictures; ``Report.model_validate_json`` reads it back."""
        pictures = {"examples", "mistakes"}
        return self.model_dump_json(indent=2, exclude=pictures, by_alias=True) + "\n"

    def slices_csv(self) -> str:
        """One line per artifact and slice; shares as fractions."""
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(
            ["name", "by", "value", "images", "objects", "found", "recall", "recall_low",
             "recall_high", "ap", "ap50"]
        )  # fmt: skip
        for row in self.rows:
            for table in row.analysis.slices if row.analysis else ():
                for one in table.rows:
                    low, high = one.interval or (None, None)
                    writer.writerow(
                        [row.name, table.by, one.value, one.images, one.objects, one.found,
                         one.recall, low, high, one.ap, one.ap50]
                    )  # fmt: skip
        return sink.getvalue()

    def to_csv(self) -> str:
        """One line per artifact; AP as a fraction, times in milliseconds."""
        sink = io.StringIO()
        records = [_flat(row, self.data) for row in self.rows]
        # A row without KITTI AP must not decide the columns.
        columns = dict.fromkeys(key for record in records for key in record)
        writer = csv.DictWriter(sink, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return sink.getvalue()


def percent(value: float | None) -> str:
    """An AP the way papers print it: times 100, one decimal; a dash where it is undefined."""
    return "–" if value is None else f"{100 * value:.1f}"


def _dominates(a: ReportRow, b: ReportRow) -> bool:
    """At least as good in both, better in one."""
    return a.coco.ap >= b.coco.ap and a.ms <= b.ms and (a.coco.ap > b.coco.ap or a.ms < b.ms)


def _flat(row: ReportRow, data: str) -> dict[str, object]:
    record: dict[str, object] = {
        "name": row.name,
        "engine": row.engine,
        "precision": row.precision,
        "parity": row.parity,
        "encoder_layers": row.encoder_layers,
        "decoder_layers": row.decoder_layers,
        "parameters": row.parameters,
        "size_mb": row.size_mb,
        "data": data,
        "images": row.coco.images,
    }
    for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar"):
        record[key] = getattr(row.coco, key)
    for iou, ap in (row.coco.at_iou or {}).items():
        record[f"ap_at_{iou}"] = ap
    if row.masks is not None:
        for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar"):
            record[f"mask_{key}"] = getattr(row.masks, key)
    for name, kitti in (row.kitti.per_class if row.kitti else {}).items():
        for level in ("easy", "moderate", "hard"):
            result = getattr(kitti, level)
            record[f"kitti_{name}_{level}_ap11"] = result.ap11
            record[f"kitti_{name}_{level}_ap40"] = result.ap40
    for part in ("engine", "end_to_end", "masks"):
        timing = getattr(row.latency, part)
        for key, value in ({} if timing is None else timing.model_dump()).items():
            record[f"{part}_{key}"] = value
    clocks, gpu, drift = (
        row.environment.after, row.environment.after.accelerator, row.environment.drift
    )  # fmt: skip
    throttling = drift.throttling if drift else "unreadable"
    record |= {
        "count": row.latency.count,
        "warmup": row.latency.warmup,
        "batch": row.latency.batch,
        "timed_images": row.latency.images,
        "run": row.environment.run,
        "reasons": "; ".join(row.environment.reasons),
        "cpu": row.environment.machine.cpu,
        "governor": clocks.governor,
        "cpu_mhz": _median(drift.cpu_mhz if drift else "unreadable"),
        "gpu": gpu.name if gpu else "",
        "gpu_driver": gpu.driver if gpu else "",
        "gpu_mhz": _median(drift.gpu_mhz if drift else "unreadable"),
        "power_mode": gpu.power_mode if gpu else clocks.power_profile or "",
        "throttling": throttling if isinstance(throttling, str) else "; ".join(throttling),
        "os": row.environment.machine.os,
        "versions": "; ".join(f"{k} {v}" for k, v in row.environment.machine.packages.items()),
        "artefact": row.artifact,
        "sha256": row.sha256,
    }
    return record


def _median(span: ClockRange | str) -> float | str:
    return span if isinstance(span, str) else span.median
