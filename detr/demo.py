"""``detr demo``: the whole path on synthetic road scenes, told in the commands a user would type.

Each step is an ordinary command line, printed before it runs, so that the demo is also the
shortest tutorial: copy the lines, put your own data in.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

# One seed apart from the one the demo teacher was trained on: nobody has seen these images.
DATA_SEED = 2026
IMAGES, SIZE = 480, "96x320"


def command_lines(out: Path, seed: int, steps: int | None) -> list[tuple[str, list[str]]]:
    """The demo as (what for, command line) pairs.

    Args:
        out: Folder everything is written under.
        seed: Training seed of all three runs.
        steps: Training steps, or ``None`` for what the recipes say.
    """
    data = out / "data"
    train = ["--set", f"data.train=kitti:{data}:train", "--set", f"data.val=kitti:{data}:val"]
    train += ["--set", f"seed={seed}"]
    if steps is not None:
        train += ["--set", f"steps={steps}"]
    runs = {name: out / name for name in ("baseline", "inherited", "student")}
    sources = {"teacher": "demo-teacher", **{name: str(run) for name, run in runs.items()}}
    bundles = {name: out / f"{name}.bundle" for name in sources}
    lines: list[tuple[str, list[str]]] = [
        (
            "Make road scenes in KITTI format",
            shlex.split(f"data synth {shlex.quote(str(data))} --images {IMAGES} --size {SIZE}")
            + shlex.split(f"--seed {DATA_SEED} --format kitti"),
        ),
        (
            "Distil the compact student from the demo teacher",
            ["distill", "run", "demo-student", "--out", str(runs["student"]), *train],
        ),
        (
            "Train the same student from the teacher's weights alone: what distilling must beat",
            ["distill", "train", "demo-student", "--set", "start=demo-teacher"]
            + ["--out", str(runs["inherited"]), *train],
        ),
        (
            "Train the same student without a teacher, for as many steps",
            ["distill", "train", "demo-student", "--out", str(runs["baseline"]), *train],
        ),
    ]
    lines += [
        (
            f"Export the {name} to a bundle",
            ["export", "onnx", sources[name], "--out", str(bundle), "--data", f"kitti:{data}:val"],
        )
        for name, bundle in bundles.items()
    ]
    lines.append(
        (
            "Measure AP and latency of the exported bundles",
            ["bench", "run", *map(str, bundles.values()), "--data", f"kitti:{data}:val"]
            + ["--engine", "onnxruntime", "--out", str(out)],
        )
    )
    return lines


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for data, runs, bundles and the report.",
)
@click.option("--seed", default=0, show_default=True, help="Training seed.")
@click.option("--steps", type=int, help="Training steps; the recipes' by default.")
def demo(out: Path, seed: int, steps: int | None) -> None:
    """Distil, export and measure a compact DETR on synthetic road scenes.

    Takes up to ten minutes on two CPU cores; run again, it goes on where it stopped.

    Example: detr demo --out runs/demo
    """
    from detr.cli import main

    start = time.monotonic()
    lines = command_lines(out, seed, steps)
    for number, (purpose, arguments) in enumerate(lines, 1):
        click.secho(f"\n[{number}/{len(lines)}] {purpose}", bold=True)
        click.echo("$ detr " + shlex.join(arguments))
        begin = time.monotonic()
        main.main(arguments, prog_name="detr", standalone_mode=False)
        click.echo(f"  {time.monotonic() - begin:.0f} s")
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    click.secho(f"\nDone in {minutes} min {seconds} s: open {out / 'report.html'}", bold=True)
