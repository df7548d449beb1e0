"""``bench compare``: reports of several runs and machines side by side, and what may be claimed.

Rows of the same name, engine, precision, depth and machine are repeats. A difference is called one
only by a test that repeats what the claim is about: latency over runs (calls of one run share its
clocks and its memory layout: Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM
2013), AP over trainings where there are several, else over images.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np

from bench.compare.model import LEVEL, Difference, Entry, Quantity, ReportComparison
from bench.compare.statistics import (
    Interval,
    block_bootstrap_medians,
    bootstrap_interval,
    holm,
    welch,
)
from bench.report.model import Report, ReportRow
from detr.cli_support import progress
from detr.errors import UserError
from detr.metrics.outcomes import MATCHES, GroundTruth, Outcomes, average_precision, unpack
from detr.sidecar import SidecarError, read_sidecar

_REPLICATES = 1000
# A resampling of fewer images has too few outcomes: its p says little of images not seen.
_LEAST_IMAGES = 30
_SEED = 0


@dataclass(frozen=True)
class _Run:
    """A row with its outcomes, and where it came from."""

    row: ReportRow
    outcomes: Outcomes | None
    truth: GroundTruth | None


def compare_reports(paths: Sequence[Path]) -> ReportComparison:
    """Merges reports.

    Args:
        paths: ``report.json`` files or the folders they lie in.

    Raises:
        UserError: ``report-unreadable``, ``compare-data`` (other images or labels),
            ``compare-twice``, ``matches-unreadable``.
    """
    reports, runs = _read(paths)
    machines = _machines([run.row for run in runs])
    groups: dict[tuple[object, ...], list[_Run]] = defaultdict(list)
    for run in runs:
        groups[_kind(run.row) + (machines[_machine(run.row)],)].append(run)
    names = _names(list(groups))
    entries = {names[key]: _entry(names[key], str(key[-1]), group) for key, group in groups.items()}
    members = {names[key]: group for key, group in groups.items()}
    for entry in entries.values():
        entry.pareto = not any(_dominates(other, entry) for other in entries.values())
    reference = _reference(list(entries.values()))
    notes = _notes(list(entries.values()), members)
    differences = _differences(entries, members, reference, notes)
    first = reports[0]
    return ReportComparison(
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        sources=[str(path) for path in paths],
        data=first.data,
        images=first.rows[0].coco.images,
        boxes=first.rows[0].coco.n_gt,
        reference=reference,
        machines={letter: text for text, letter in machines.items()},
        entries=sorted(entries.values(), key=lambda e: (e.machine, -e.ap, e.ms)),
        differences=differences,
        notes=notes,
    )


def _read(paths: Sequence[Path]) -> tuple[list[Report], list[_Run]]:
    reports: list[Report] = []
    runs: list[_Run] = []
    seen: set[Path] = set()
    for path in paths:
        file = path / "report.json" if path.is_dir() else path
        if file.resolve() in seen:
            raise UserError("compare-twice", f"{file}: the same report is given twice")
        seen.add(file.resolve())
        report = _read_report(file)
        if reports and _truth_key(report) != _truth_key(reports[0]):
            raise UserError(
                "compare-data",
                f"{file}: measured on other images or labels than {paths[0]} "
                f"({report.data}, {report.rows[0].coco.images} images, against {reports[0].data}, "
                f"{reports[0].rows[0].coco.images}); APs of different data do not compare",
            )
        reports.append(report)
        truth, outcomes = None, dict[str, Outcomes]()
        if (file.parent / MATCHES).is_file():
            truth, outcomes = unpack(file.parent / MATCHES)
            if truth.fingerprint != report.truth_sha256:
                truth, outcomes = None, {}
        runs += [_Run(row, outcomes.get(row.name), truth) for row in report.rows]
    return reports, runs


def _read_report(file: Path) -> Report:
    try:
        report = read_sidecar(file, Report)
    except SidecarError as error:
        raise UserError("report-unreadable", str(error)) from error
    if not report.rows:
        raise UserError("report-unreadable", f"{file}: rows: a report of nothing")
    return report


def _truth_key(report: Report) -> tuple[object, ...]:
    """The ground truth's fingerprint, or what an older report tells of it."""
    if report.truth_sha256 is not None:
        return (report.truth_sha256,)
    coco = report.rows[0].coco
    return (coco.images, coco.n_gt, *((n, c.count) for n, c in coco.per_class.items()))


def _kind(row: ReportRow) -> tuple[object, ...]:
    """What makes two rows repeats of one another, the machine aside."""
    return (row.model, row.engine, row.precision, row.encoder_layers, row.decoder_layers)


def _machine(row: ReportRow) -> str:
    """What latency depends on and the artifact does not bring along."""
    machine, gpu = row.environment.machine, row.environment.after.accelerator
    parts = [f"{machine.cpu}, {machine.cores_usable} of {machine.cores} cores"]
    if gpu is not None:
        parts.append(f"{gpu.name}, {gpu.power_mode}")
    parts += [f"{key}={value}" for key, value in machine.thread_settings.items()]
    return "; ".join(parts)


def _machines(rows: Sequence[ReportRow]) -> dict[str, str]:
    """Letters for the machines, in the order they appear."""
    texts = list(dict.fromkeys(_machine(row) for row in rows))
    return {text: chr(ord("A") + k) if k < 26 else f"M{k}" for k, text in enumerate(texts)}


def _names(keys: Sequence[tuple[object, ...]]) -> dict[tuple[object, ...], str]:
    """As much of name, engine, precision, depth and machine as tells one key from the others."""
    parts = {
        key: [str(key[0]), str(key[1]), str(key[2]), f"{key[3]}/{key[4]}", f"on {key[5]}"]
        for key in keys
    }
    result = {}
    for key, own in parts.items():
        same = [other for other in parts.values() if other[0] == own[0]]
        varied = [own[k] for k in range(1, 5) if len({other[k] for other in same}) > 1]
        result[key] = " ".join([own[0], *varied])
    return result


def _entry(name: str, machine: str, group: Sequence[_Run]) -> Entry:
    rows = [run.row for run in group]
    aps = _aps(group)
    medians = [row.ms for row in rows]
    return Entry(
        name=name, machine=machine, engine=rows[0].engine, precision=rows[0].precision,
        encoder_layers=rows[0].encoder_layers, decoder_layers=rows[0].decoder_layers,
        runs=len(rows), trainings=len(aps),
        clean=sum(row.environment.run == "clean" for row in rows),
        ap=float(np.mean(aps)), ap_low=min(aps), ap_high=max(aps),
        ms=median(medians), ms_low=min(medians), ms_high=max(medians),
        p90_ms=median(row.latency.end_to_end.p90_ms for row in rows),
        engine_ms=median(row.latency.engine.p50_ms for row in rows),
        size_mb=rows[0].size_mb,
    )  # fmt: skip


def _aps(runs: Sequence[_Run]) -> list[float]:
    """One AP for each training: engines built or bundles exported again are no new one."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        found[run.row.checkpoint_sha256 or run.row.sha256].append(run.row.coco.ap)
    return [float(np.mean(aps)) for aps in found.values()]


def _dominates(a: Entry, b: Entry) -> bool:
    """On the same machine at least as good in both, better in one."""
    if a.machine != b.machine:
        return False
    return a.ap >= b.ap and a.ms <= b.ms and (a.ap > b.ap or a.ms < b.ms)


def _reference(entries: Sequence[Entry]) -> str:
    """The teacher if one is called so, else the best by AP."""
    teachers = [entry.name for entry in entries if "teacher" in entry.name.lower()]
    return teachers[0] if teachers else max(entries, key=lambda entry: entry.ap).name


def _differences(
    entries: dict[str, Entry], members: dict[str, list[_Run]], reference: str, notes: list[str]
) -> list[Difference]:
    """Every entry against the reference in AP, and in latency against its machine's reference.

    AP is the artifact's and the engine's, not the machine's: it is tested once.
    """
    base = entries[reference]
    tested = {_identity(members[reference])}
    found: list[Difference] = []
    for entry in progress(list(entries.values()), "testing differences"):
        runs = members[entry.name]
        if _identity(runs) not in tested:
            tested.add(_identity(runs))
            difference = _ap_difference(entry, base, runs, members[reference], notes)
            found += [difference] if difference is not None else []
        local = _local_reference(entry, base, entries, members)
        if local.name != entry.name:
            difference = _speed(entry, local, runs, members[local.name], notes)
            found += [difference] if difference is not None else []
    for quantity in ("AP", "latency"):
        same = [d for d in found if d.quantity == quantity]
        for difference, p in zip(same, holm([d.p for d in same]), strict=True):
            difference.p = p
            difference.significant = difference.significant and p < LEVEL
    return sorted(found, key=lambda d: d.quantity)


def _identity(runs: Sequence[_Run]) -> tuple[frozenset[str], str]:
    """What an entry's AP depends on."""
    return frozenset(run.row.sha256 for run in runs), runs[0].row.engine


def _local_reference(
    entry: Entry, base: Entry, entries: dict[str, Entry], members: dict[str, list[_Run]]
) -> Entry:
    """The reference where it ran on the entry's machine, else the machine's best by AP."""
    here = [other for other in entries.values() if other.machine == entry.machine]
    kind = _kind(members[base.name][0].row)
    same = [other for other in here if _kind(members[other.name][0].row) == kind]
    return same[0] if same else max(here, key=lambda other: other.ap)


def _ap_difference(
    entry: Entry, base: Entry, runs: Sequence[_Run], base_runs: Sequence[_Run], notes: list[str]
) -> Difference | None:
    if min(entry.trainings, base.trainings) >= 2:
        interval = welch(_aps(base_runs), _aps(runs))
        method = f"Welch's t-test over {base.trainings} and {entry.trainings} trainings"
        return _difference(entry, base, "AP", interval, method, "for trainings like these")
    if entry.trainings != base.trainings:
        notes.append(
            f"AP of {entry.name} against {base.name}: {entry.trainings} against {base.trainings} "
            "trainings; train both at least twice to compare them"
        )
        return None
    both = ((a.outcomes, b.outcomes, b.truth) for a in base_runs for b in runs)
    pair = next((found for found in both if None not in found), None)
    if pair is None or pair[0] is None or pair[1] is None or pair[2] is None:
        notes.append(
            f"AP of {entry.name} against {base.name}: no {MATCHES} beside the reports, so there is "
            "nothing to test the difference with; measure again with bench run --out"
        )
        return None
    interval = _resampled(pair[0], pair[1], pair[2])
    images = len(pair[2].positives)
    enough = images >= _LEAST_IMAGES
    difference = _difference(
        entry, base, "AP", interval, f"paired bootstrap over {images} images",
        "for images like these; another training may differ" if enough
        else f"fewer than {_LEAST_IMAGES} images claim nothing",
    )  # fmt: skip
    difference.significant = enough
    return difference


def _resampled(base: Outcomes, other: Outcomes, truth: GroundTruth) -> Interval:
    """AP difference over the same resamplings of the images for both."""
    count = len(truth.positives)
    generator = np.random.default_rng(_SEED)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=_REPLICATES)
    gap = average_precision(other, truth, weights) - average_precision(base, truth, weights)
    value = average_precision(other, truth)[0] - average_precision(base, truth)[0]
    return bootstrap_interval(float(value), gap[~np.isnan(gap)])


def _speed(
    entry: Entry, base: Entry, runs: Sequence[_Run], base_runs: Sequence[_Run], notes: list[str]
) -> Difference | None:
    if min(entry.runs, base.runs) >= 2:
        # On logarithms a difference is a ratio, and long latencies do not weigh more.
        logs = [[math.log(run.row.ms) for run in group] for group in (runs, base_runs)]
        interval = _exponential(welch(*logs))
        method = f"Welch's t-test over the medians of {base.runs} and {entry.runs} runs"
        return _difference(entry, base, "latency", interval, method, "for runs like these")
    samples = [group[0].row.latency.samples_ms for group in (runs, base_runs)]
    if not all(samples):
        notes.append(
            f"latency of {entry.name} against {base.name}: one run each and no times of single "
            "calls in the reports; measure again"
        )
        return None
    medians = [
        block_bootstrap_medians(np.asarray(s, dtype=np.float64), _REPLICATES, _SEED + k)
        for k, s in enumerate(samples)
    ]
    logs_gap = np.log(medians[1]) - np.log(medians[0])
    value = math.log(median(samples[1]) / median(samples[0]))
    interval = _exponential(bootstrap_interval(value, logs_gap))
    difference = _difference(
        entry, base, "latency", interval, "block bootstrap over the calls of one run each",
        "within these two runs; repeat bench run to claim it",
    )  # fmt: skip
    difference.significant = False
    return difference


def _exponential(interval: Interval) -> Interval:
    return Interval(
        math.exp(interval.value), math.exp(interval.low), math.exp(interval.high), interval.p
    )


def _difference(
    entry: Entry, base: Entry, quantity: Quantity, interval: Interval, method: str, scope: str
) -> Difference:
    return Difference(
        entry=entry.name, reference=base.name, quantity=quantity, value=interval.value,
        low=interval.low, high=interval.high, p=interval.p, method=method, scope=scope,
        significant=True,
    )  # fmt: skip


def _notes(entries: Sequence[Entry], members: dict[str, list[_Run]]) -> list[str]:
    notes = []
    if len({entry.machine for entry in entries}) > 1:
        notes.append("latencies of different machines are not compared with one another")
    uncertified = [entry.name for entry in entries if entry.clean < entry.runs]
    if uncertified:
        notes.append(
            "runs without certified clocks, whose latency may be another machine state's: "
            + ", ".join(uncertified)
        )
    for name, group in members.items():
        versions = {tuple(sorted(r.row.environment.machine.packages.items())) for r in group}
        if len(versions) > 1:
            notes.append(f"{name}: its runs used different package versions")
    return notes
