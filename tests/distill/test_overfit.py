"""A detector learns four images by heart, through the whole training loop.

``docs/measure/overfit.py`` does the same for every family.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "measure" / "overfit.py"


@pytest.mark.parametrize(("family", "steps"), [("dino", 150)])
def test_four_images_by_heart(family, steps, tmp_path):
    assert runpy.run_path(str(SCRIPT))["overfit"](family, steps, tmp_path) >= 0.9
