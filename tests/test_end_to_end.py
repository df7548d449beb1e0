"""The whole path by its commands, as short as it can be, and the shipped teacher on real images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detr.cli import main
from detr.data import open_dataset
from detr.shipped import ASSETS
from engines import open_engine

TINY = [
    "steps=3",
    "batch_size=2",
    "checkpoint_every=2",
    "detector.width=32",
    "detector.attention_heads=2",
    "detector.encoder.ffn=32",
    "detector.decoder.ffn=32",
    "detector.queries.number=12",
    "detector.backbone.options={channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}",
]


def detr(*arguments: object) -> None:
    main.main([str(a) for a in arguments], prog_name="detr", standalone_mode=False)


@pytest.mark.slow
def test_distil_export_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    detr("data", "synth", data, "--images", 10, "--size", "64x160", "--seed", 3)
    settings = [*TINY, f"data.train=kitti:{data}:train", f"data.val=kitti:{data}:val"]
    options = [word for key in [*settings, "input.size=[64, 160]"] for word in ("--set", key)]
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    detr("distill", "train", "demo-teacher", "--out", teacher, *options)
    detr(
        "distill", "run", "demo-student", "--out", student, *options, "--set", f"teacher={teacher}"
    )
    bundles = []
    for run in (teacher, student):
        bundles.append(tmp_path / f"{run.name}.bundle")
        detr("export", "onnx", run, "--out", bundles[-1], "--data", f"kitti:{data}:val")
    report = tmp_path / "report"
    detr(
        "bench", "run", *bundles, "--data", f"kitti:{data}:val", "--engine", "onnxruntime",
        "--iterations", 3, "--out", report,
    )  # fmt: skip

    rows = json.loads((report / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student"]
    assert all(
        row["engine"] == "onnxruntime" and row["latency"]["end_to_end"]["p50_ms"] > 0
        for row in rows
    )
    assert {path.suffix for path in report.iterdir()} >= {".json", ".md", ".csv", ".html"}
    losses = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("qskd/") for line in losses for key in line)

    # The same command again finds nothing to do, and says so.
    capsys.readouterr()
    before = (student / "model.safetensors").read_bytes()
    detr(
        "distill", "run", "demo-student", "--out", student, *options, "--set", f"teacher={teacher}"
    )
    assert "finished" in "".join(capsys.readouterr())
    assert (student / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_onnxruntime_equals_torch_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "teacher.bundle"
    detr("export", "onnx", "demo-teacher", "--out", bundle)
    reference, exported = open_engine(Path("demo-teacher")), open_engine(bundle, "onnxruntime")
    dataset = open_dataset(f"kitti:{shared_data / 'kitti_tiny'}")
    found = 0
    for i in range(20):
        image = [dataset.image(i)]
        expected, got = reference(image)[0].above(0.3), exported(image)[0].above(0.3)
        assert len(got) == len(expected)
        np.testing.assert_array_equal(got.labels, expected.labels)
        np.testing.assert_allclose(got.boxes, expected.boxes, atol=0.5)
        np.testing.assert_allclose(got.scores, expected.scores, atol=1e-3)
        found += len(expected)
    assert found >= 20, "the comparison needs detections to compare"


def test_shipped_teacher_is_small_and_says_how_it_was_made() -> None:
    weights = ASSETS / "demo-teacher.safetensors"
    assert weights.stat().st_size <= 8_000_000
    provenance = json.loads(weights.with_suffix(".json").read_text())["provenance"]
    assert provenance["ap50"] >= 0.6
    assert provenance["recipe"] == "demo-teacher"
