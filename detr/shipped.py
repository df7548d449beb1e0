"""Models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def find_model(path: Path) -> Path:
    """The path of a model given by path or by the name of a shipped one (``demo-teacher``).

    A path that exists always wins; a name that is neither comes back as it is, for the caller to
    complain about.
    """
    shipped = ASSETS / f"{path}.safetensors"
    return shipped if not path.exists() and len(path.parts) == 1 and shipped.is_file() else path
