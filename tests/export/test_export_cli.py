"""``detr export onnx`` as typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from export.cli import main

MakeCheckpoint = Callable[..., Path]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["onnx", "nowhere", "--out", "x.bundle"], "checkpoint-missing"),
        (["onnx", "nowhere", "--out", "x.bundle", "--batch", "0"], "option-batch"),
        (["onnx", "nowhere", "--out", "x.bundle", "--batch", "many"], "option-batch"),
        (["onnx", "nowhere", "--out", "x.bundle", "--precision", "int8"], "precision-data"),
        (["onnx", "nowhere", "--out", "x.bundle", "--calibration", "kitti:/x"], "precision-data"),
        (
            ["onnx", "nowhere", "--out", "x.bundle", "--precision", "fp16", "--search-islands"],
            "precision-data",
        ),
        (
            ["onnx", "nowhere", "--out", "x.bundle", "--search-islands", "--data", "kitti:/x"],
            "precision-data",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error[{code}]") and result.stderr.count("\n") == 1


def test_unknown_calibration_is_told_before_the_export(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    options = ["--precision", "int8", "--calibration", "kitti:/nowhere"]
    result = call("onnx", checkpoint("deformable"), "--out", tmp_path / "x.bundle", *options)
    assert result.exit_code == 2 and "/nowhere" in result.stderr
    assert result.stderr.count("\n") == 1


def test_unknown_data_is_told_before_the_export(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    result = call(
        "onnx", checkpoint("deformable"), "--out", tmp_path / "x.bundle", "--data", "kitti:/nowhere"
    )
    assert result.exit_code == 2 and "/nowhere" in result.stderr
    assert not (tmp_path / "x.bundle").exists()
