"""``bench run --unlabeled``: how long models take on images nobody has labeled; no AP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from bench.artifact import identity
from bench.latency import Latency
from bench.machine.environment import Environment
from bench.opened import model_names, open_artifact
from bench.report.model import Speed
from bench.turns import TIMED_IMAGES, speed_beside, time_in_turns
from detr.data import open_dataset
from detr.data.dataset import evenly_spaced
from detr.data.images import read_image
from detr.errors import UserError
from engines.predict.sources import find_sources


class TimedArtifact(BaseModel):
    """One artifact's latency.

    Attributes:
        name: Short and unique in the report.
        engine: Runtime that ran it.
        precision: Of the artifact.
        artifact: Path as given on the command line.
        sha256: Of the artifact.
        threads: Of the engine, where the user said how many.
        latency: Engine only and end to end.
        speed: Relative to the first.
        environment: Machine and clocks while it was timed.
    """

    name: str
    engine: str
    precision: str
    artifact: str
    sha256: str
    threads: int | None
    latency: Latency
    speed: Speed | None = None
    environment: Environment


class TimingReport(BaseModel):
    """Latency of artifacts on images without labels.

    Attributes:
        data: Images as named on the command line.
        images: How many were in rotation.
        rows: One per artifact, in the order given.
        commands: What to type to get this report again.
    """

    data: str
    images: int
    rows: list[TimedArtifact]
    commands: list[str]

    def misses(self, ms: float | None) -> list[str]:
        """One phrase per artifact whose 90th percentile end to end is over ``ms``."""
        times = {row.name: row.latency.end_to_end.p90_ms for row in self.rows}
        return [
            f"{name}: p90 end to end {p90:.4g} ms (at most {ms:g} ms)"
            for name, p90 in times.items()
            if ms is not None and not p90 <= ms
        ]

    def text(self) -> str:
        """A line per artifact."""
        lines = [f"{self.images} images of {self.data}; no labels, no AP; median end to end"]
        for row in self.rows:
            both = row.latency.end_to_end
            masks = row.latency.masks
            told = "" if masks is None else f", enlarging masks {masks.p50_ms:.1f}"
            speed = "" if row.speed is None else f", {row.speed.text()} times {self.rows[0].name}'s"
            lines.append(
                f"{row.name}: {both.p50_ms:.1f} ms (p90 {both.p90_ms:.1f}, engine alone "
                f"{row.latency.engine.p50_ms:.1f}{told}){speed}; {row.environment.run}"
            )
        return "\n".join(lines)


def benchmark_timing(
    models: Sequence[Path],
    data: str,
    engine: str | None,
    threads: int | None,
    limit: int | None,
    iterations: int,
    commands: Sequence[str] = (),
) -> TimingReport:
    """Times models in turns on images that need no labels.

    Args:
        models: Bundles, checkpoints or run directories.
        data: An image, a folder or a pattern; or a data set, whose labels are not read.
        engine: Runtime, see :func:`engines.open_engine`.
        threads: Of every engine.
        limit: Use this many images, spread evenly.
        iterations: Timed calls per model.
        commands: How to repeat it.

    Raises:
        UserError: ``data-empty``; what opening a model or reading the images raises.
    """
    artifacts = [
        open_artifact(name, path, engine, threads)
        for name, path in zip(model_names(models), models, strict=True)
    ]
    paths = _images(data)
    chosen = [paths[k] for k in evenly_spaced(len(paths), limit)]
    chosen = [chosen[k] for k in evenly_spaced(len(chosen), TIMED_IMAGES)]
    images = [read_image(path) for path in chosen]
    timings, environments = time_in_turns(artifacts, images, iterations)
    rows = [
        TimedArtifact(
            name=artifact.name,
            engine=artifact.engine.name,
            precision=artifact.precision,
            artifact=str(artifact.path),
            sha256=identity(artifact.engine.artifacts),
            threads=artifact.threads,
            latency=latency,
            environment=environment,
        )
        for artifact, latency, environment in zip(artifacts, timings, environments, strict=True)
    ]
    for row in rows[1:]:
        row.speed = speed_beside(rows[0].latency, row.latency)
    return TimingReport(data=data, images=len(images), rows=rows, commands=list(commands))


def _images(data: str) -> list[Path]:
    path = Path(data)
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        return [source.path for source in find_sources([path]) if not source.is_video]
    dataset = open_dataset(data)
    if not len(dataset):
        raise UserError("data-empty", f"{data}: no images to time on")
    return [dataset.image_path(i) for i in range(len(dataset))]
