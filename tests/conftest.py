"""Fixtures for every room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real KITTI and COCO samples; tests that want it are skipped without it.

    Looked for in ``$DETR_TEST_DATA`` and, failing that, in ``shared/data`` beside the checkout.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DETR_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
