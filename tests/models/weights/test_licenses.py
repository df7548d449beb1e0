"""Every reader of published weights can say under which license they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from detr.models.weights import hugging_face, original
from detr.models.weights.cli import weights
from detr.models.weights.licenses import LICENSES
from tests.models.test_parity_original import GOLDEN, state_dict


def test_every_reader_has_one() -> None:
    readers = {*hugging_face.FAMILIES, *original.FAMILIES, "detrex", "mmdet", "deim"}
    assert readers <= set(LICENSES)
    assert len(set(LICENSES) - readers) <= 2  # of families whose readers are being written


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        ("h-deformable", [], "HDETR/H-Deformable-DETR are under MIT;"),
        ("mmdet-detr", [], "open-mmlab/mmdetection are under Apache-2.0;"),
        ("detrex-detr", [], "IDEA-Research/detrex are under Apache-2.0;"),
        ("dab", [], "IDEA-Research/DAB-DETR are under Apache-2.0;"),
        ("rt_detr/rtdetr", [], "lyuwenyu/RT-DETR are under Apache-2.0;"),
        ("rt_detr/deim-rtdetrv2", ["--deim"], "ShihuaHuang95/DEIM are under Apache-2.0;"),
    ],
)
def test_an_import_says_it(file: str, options: list[str], words: str, tmp_path: Path) -> None:
    torch.save({"model": state_dict(np.load(GOLDEN / f"{file}.npz"))}, tmp_path / "x.pth")
    arguments = ["import", str(tmp_path / "x.pth"), "--out", str(tmp_path / "x.safetensors")]
    result = CliRunner().invoke(weights, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"license: published weights of {words} yours is what came" in result.output


def test_sizes_under_another_license_are_named() -> None:
    assert str(LICENSES["rf_detr"]).endswith("2XLarge under the Platform Model License 1.0")
