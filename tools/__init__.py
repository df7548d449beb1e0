"""Programs that produce the figures of docs/; run from the root: ``python -m tools.NAME``."""
