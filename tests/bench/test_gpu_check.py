"""``make gpu-check`` says so without a GPU; one section's failure loses no other's result."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs/measure/gpu_check.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "machine", lambda: {"gpu": "a GPU"})
    return module


def test_without_a_gpu_it_says_so_in_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(script, "compute_capability", lambda: None)
    assert script.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[device-missing]: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_each_section_is_recorded_on_its_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """One passes, one is killed by a signal, one hangs, one babbles, one is not installed."""
    written_before: list[list[str]] = []

    def answer(command: list[str], **options: Any) -> SimpleNamespace:
        files = list(tmp_path.glob("gpu-*.json"))
        written_before.append(list(json.loads(files[0].read_text())["sections"]) if files else [])
        name = command[command.index("--section") + 1]
        if name == "gradients":
            return SimpleNamespace(returncode=-11, stdout="", stderr="a\nillegal address\n")
        if name == "onnxruntime-cuda":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        if name == "tensorrt-rtx":
            return SimpleNamespace(returncode=0, stdout="all fine\n", stderr="")
        status = {"tensorrt": "skipped"}.get(name, "passed")
        text = json.dumps({"status": status, "reason" if status == "skipped" else "result": "r"})
        return SimpleNamespace(returncode=0, stdout=text, stderr="")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(script, "compute_capability", lambda: 86)
    monkeypatch.setattr(script, "exported", lambda folder: [Path("x.bundle")])
    assert script.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("gpu-20??-??-??.json")
    report = json.loads(path.read_text())
    sections = report["sections"]
    assert {name: entry["status"] for name, entry in sections.items()} == {
        "kernel": "passed",
        "gradients": "failed",
        "onnxruntime-cuda": "failed",
        "tensorrt-rtx": "failed",
        "tensorrt": "skipped",
    }
    assert sections["gradients"] | {"seconds": 0, "command": ""} == {
        "status": "failed",
        "reason": "illegal address",
        "exit_status": -11,
        "seconds": 0,
        "command": "",
    }
    assert "3600 s" in sections["onnxruntime-cuda"]["reason"]
    assert "all fine" in sections["tensorrt-rtx"]["reason"]
    assert sections["kernel"]["command"].endswith("--section kernel x.bundle")
    assert written_before == [list(sections)[:k] for k in range(5)], "written at the end only"
    assert report["machine"] == {"gpu": "a GPU"} and report["bundles"] == ["x.bundle"]
    assert "illegal address" in capsys.readouterr().out


def test_all_passed_is_exit_status_0(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passed = SimpleNamespace(returncode=0, stdout='{"status": "passed"}', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: passed)
    monkeypatch.setattr(script, "compute_capability", lambda: 86)
    assert script.main(["x.bundle", "--only", "kernel", "--out", str(tmp_path)]) == 0


def test_a_runtime_that_is_not_installed_is_skipped(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--section", "tensorrt", str(tmp_path / "x.bundle")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[2])
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["status"] == "skipped" and "detr-distillery[trt]" in answer["reason"]


def test_one_failure_within_a_section_leaves_the_others(script: ModuleType) -> None:
    found = script.each({"bad": lambda: 1 // 0, "good": lambda: {"ms": 2}})
    assert found == {
        "bad": {"failed": "integer division or modulo by zero"},
        "good": {"ms": 2},
    }


def test_a_failing_section_says_why(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = tmp_path / "gone.bundle"
    command = [sys.executable, str(SCRIPT), "--section", "tensorrt-rtx", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["status"] == "failed"
    assert f"error[bundle-missing]: {bundle}" in answer["reason"]
    assert f"error[bundle-missing]: {bundle}" in answer["result"]["gone.bundle"]["failed"]


def test_make_runs_it() -> None:
    text = (SCRIPT.parents[2] / "Makefile").read_text()
    assert "gpu-check: install\n" in text and "docs/measure/gpu_check.py $(BUNDLES)" in text
