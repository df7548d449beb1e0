"""``python -m detr``: the umbrella command."""

from detr.cli import main

main(prog_name="detr")
