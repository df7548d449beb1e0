"""The umbrella command ``detr``: the core's own verbs and, by name, those of the other rooms."""

from __future__ import annotations

import click

from detr.cli_support import LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "data": "detr.data.cli:data",
        "demo": "detr.demo:demo",
        "predict": "engines.cli:predict",
        "distill": "distill.cli:main",
        "export": "export.cli:main",
        "bench": "bench.cli:main",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="detr-distillery", prog_name="detr")
def main() -> None:
    """Distil, export and measure detection transformers.

    Example: detr demo
    """
