"""A detector learns four images by heart, through the whole training loop.

``tools/overfit.py`` does the same for every family and keeps what it found.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detr.presets import FAMILIES
from tools.overfit import overfit

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "steps"), [("dino", 150)])
def test_four_images_by_heart(family, steps, tmp_path):
    assert overfit(family, steps, tmp_path)["ap50"] >= 0.9


def test_every_family_was_seen_to():
    found = json.loads((DOCS / "measured" / "overfit.json").read_text())
    # A light mask head on others (``--masks``).
    light = {"rtdetr with masks", "d-fine with masks"}
    assert found.keys() == FAMILIES.keys() | light
    assert min(row["ap50"] for row in found.values()) >= 0.9
    with_masks = {name for name, config in FAMILIES.items() if config.heads.masks is not None}
    with_masks |= light
    assert {name for name, row in found.items() if "mask_ap50" in row} == with_masks
    for name in with_masks:
        assert min(found[name]["ap50"], found[name]["mask_ap50"]) >= 0.95, name
