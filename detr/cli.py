"""The umbrella command ``detr``: the core's own verbs and, by name, those of the other rooms."""

from __future__ import annotations

import click

from detr.cli_support import LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "bench": ("bench.cli:main", "Measure AP and latency of the artifact that ships."),
        "data": ("detr.data.cli:data", "Check, show, convert, split data sets."),
        "demo": ("detr.demo:demo", "The whole path on synthetic road scenes, in minutes."),
        "distill": ("distill.cli:main", "Train detectors, distil large ones into small ones."),
        "export": ("export.cli:main", "Turn checkpoints into bundles that prove themselves."),
        "model": ("detr.models.cli:model", "Describe architectures, cut layers out."),
        "predict": ("engines.cli:predict", "Find objects in images."),
        "weights": ("detr.models.weights.cli:weights", "Import published weights."),
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="detr-distillery", prog_name="detr")
def main() -> None:
    """Distil, export and measure detection transformers.

    Example: detr demo
    """
