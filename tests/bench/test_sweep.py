"""``bench sweep``: together and one after the other."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bench.opened as bench_opened
from bench.cli import main
from bench.report.model import Report
from bench.sweep import sweep
from detr.config import ClassMap
from detr.errors import UserError


def invoke(command: list[str]) -> Any:
    return CliRunner().invoke(main, command)


def test_sweep_is_one_page_of_depth_by_engine(
    bright_cars: Path, tmp_path: Path, engine_type: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, engine: str, threads: int | None) -> Any:
        if engine == "tensorrt" or (engine == "openvino" and path.stem == "deep"):
            raise UserError("runtime-missing", f"engine {engine}: not here")
        made = engine_type(path, 0.0 if path.stem == "deep" else 3.0)
        made.name = engine
        layers = 6 if path.stem == "deep" else 3
        depths = {"encoder.layers": layers, "decoder.layers": layers}
        made.info = made.info.model_copy(update={"detector": made.info.detector.replace(**depths)})
        return made

    monkeypatch.setattr(bench_opened, "open_engine", opened)
    paths = []
    for name in ("deep", "flat"):
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes((2).to_bytes(8, "little") + b"{}" + name.encode())
    command = ["sweep", *map(str, paths), "--data", f"kitti:{bright_cars}:val", "--limit", "4"]
    command += ["--engines", "native,openvino,tensorrt", "--iterations", "20"]
    run = invoke([*command, "--out", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    report = Report.model_validate_json((tmp_path / "out/report.json").read_text())
    assert [(r.name, r.encoder_layers, round(r.coco.ap, 3)) for r in report.rows] == [
        ("deep native", 6, 1.0),
        ("flat native", 3, 0.7),
        ("flat openvino", 3, 0.7),
    ]
    # The best has no ratio to itself; the others' carry one, as they took turns with it.
    assert [row.speed is None for row in report.rows] == [True, False, False]
    assert len(report.skipped) == 3 and "deep openvino: engine openvino" in report.skipped[0]
    html = (tmp_path / "out/report.html").read_text()
    assert "Depth by precision and engine" in html and "6/6" in html
    table = (tmp_path / "out/report.md").read_text()
    assert "| layers | native fp32 | openvino fp32 |" in table
    assert "| 6/6 |" in table and "| – |" in table
    assert (tmp_path / "out/matches.npz").exists()
    assert "--engines native,openvino,tensorrt" in report.commands[0]

    for names, code in (
        ("tensorrt", "sweep-empty"), ("native,opnvino", "engine-unknown"), (",", "usage")
    ):  # fmt: skip
        wrong = invoke([*command[:-3], names, *command[-2:], "--out", str(tmp_path / "out")])
        assert wrong.exit_code == 2 and f"error[{code}]" in wrong.stderr


def test_a_sweep_one_after_the_other_finds_what_one_together_does(
    bright_cars: Path, tmp_path: Path, engine_type: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def opened(path: Path, engine: str, threads: int | None) -> Any:
        nonlocal most
        made = engine_type(path, 0.0 if path.stem == "deep" else 3.0)
        alive.append(weakref.ref(made))
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        return made

    monkeypatch.setattr(bench_opened, "open_engine", opened)
    paths = [tmp_path / f"{name}.safetensors" for name in ("flat", "deep", "other")]
    for path in paths:
        path.write_bytes((2).to_bytes(8, "little") + b"{}" + path.stem.encode())
    data = f"kitti:{bright_cars}:val"
    apart = sweep(paths, ["native"], data, 4, 20, together=False)
    assert most == 1
    beside = sweep(paths, ["native"], data, 4, 20)
    assert [(row.name, row.coco.ap) for row in apart.rows] == [
        (row.name, row.coco.ap) for row in beside.rows
    ]
    assert apart.reference == beside.reference == "deep native"
    assert apart.matches == beside.matches
    assert all(row.speed is None for row in apart.rows)


def test_a_sweep_refuses_models_of_different_classes(
    bright_cars: Path, engine_type: type[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {"cars": ("Car", "Pedestrian"), "other": ("Pedestrian", "Car")}

    def opened(path: Path, engine: str, threads: int | None) -> Any:
        made = engine_type(path)
        classes = ClassMap(names=names[path.stem], category_ids=(1, 4))
        made.info = made.info.model_copy(update={"classes": classes})
        return made

    monkeypatch.setattr(bench_opened, "open_engine", opened)
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    for path in paths:
        path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError) as caught:
        sweep(paths, ["native"], f"kitti:{bright_cars}:val", iterations=1)
    assert caught.value.code == "bench-classes" and "other.safetensors" in caught.value.message
