"""Folders of real-time detectors as the transformers library writes them.

It saves tensors under other names than those of its state dict: RF-DETR's under the original
repository's, others' under those of older releases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from detr.models.weights.hugging_face import convert, read_folder
from tests.models import (
    test_parity_d_fine,
    test_parity_lw_detr,
    test_parity_rf_detr,
    test_parity_rt_detr,
)

KINDS: dict[str, Any] = {
    "rt_detr": test_parity_rt_detr.CASES["basic"],
    "rt_detr_v2": test_parity_rt_detr.CASES["basic"],
    "d_fine": test_parity_d_fine.TINY,
    "lw_detr": test_parity_lw_detr.TINY,
    "rf_detr": test_parity_rf_detr.TINY,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_the_library_s_model(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**KINDS[kind])
    transformers.AutoModelForObjectDetection.from_config(config).save_pretrained(tmp_path)
    # What the library reads back; some of it is not what it was told to write.
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = convert(model.config.to_dict(), state, "state dict")
    found = read_folder(tmp_path)
    assert found.detector.config == wanted.detector.config
    own = wanted.detector.state_dict()
    for name, tensor in found.detector.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert found.without == wanted.without == frozenset()
