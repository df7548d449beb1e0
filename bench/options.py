"""Options that several commands of ``detr bench`` have."""

from __future__ import annotations

from pathlib import Path

import click

models_argument = click.argument(
    "models", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
data_option = click.option(
    "--data", required=True, help="kitti:PATH[:SPLIT], coco:PATH[:SPLIT] or a YAML file."
)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), help="Use this many images, spread evenly."
)
iterations_option = click.option(
    "--iterations",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Timed calls per model and engine.",
)
