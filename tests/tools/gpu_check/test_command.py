"""``make gpu-check`` says so without a GPU; one part's failure loses no other's result."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from detr.data.preprocess import PreprocessConfig
from tools import gpu_check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu": "a GPU"})
    return gpu_check


def test_without_a_gpu_it_says_so_in_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(script, "compute_capability", lambda: None)
    assert script.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[device-missing]: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_each_part_is_recorded_on_its_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """One passes, one is killed by a signal, one hangs, one babbles, one is not installed."""
    written_before: list[int] = []

    def answer(command: list[str], **options: Any) -> SimpleNamespace:
        files = list(tmp_path.glob("gpu-*.json"))
        parts = json.loads(files[0].read_text())["sections"].values()
        written_before.append(sum(len(p) for p in parts))
        section, part = (command[command.index(x) + 1] for x in ("--section", "--part"))
        if part == "float16":
            return SimpleNamespace(returncode=-11, stdout="", stderr="a\nillegal address\n")
        if section == "onnxruntime-cuda":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        if section == "tensorrt-rtx":
            return SimpleNamespace(returncode=0, stdout="all fine\n", stderr="")
        status = {"tensorrt": "skipped"}.get(section, "passed")
        told = json.dumps({"status": status, "reason" if status == "skipped" else "result": "r"})
        return SimpleNamespace(returncode=0, stdout=f"a library's greeting\n{told}\n", stderr="")

    def exported(folder: Path) -> tuple[list[Path], dict[str, Any]]:
        failed = {"status": "failed", "reason": "no room", "seconds": 1.0}
        return [Path("x.bundle")], {"fp16": failed}

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(script, "compute_capability", lambda: 86)
    monkeypatch.setattr(script, "exported", exported)
    names = ["gradients", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
    assert script.main(["--out", str(tmp_path), "--only", *names]) == 1
    (path,) = tmp_path.glob("gpu-20??-??-??.json")
    report = json.loads(path.read_text())
    sections = report["sections"]
    assert {n: {k: e["status"] for k, e in parts.items()} for n, parts in sections.items()} == {
        "export": {"fp16": "failed"},
        "gradients": {"float32": "passed", "float16": "failed", "bfloat16": "passed"},
        "onnxruntime-cuda": {"x.bundle": "failed"},
        "tensorrt-rtx": {"x.bundle": "failed"},
        "tensorrt": {"x.bundle gather": "skipped", "x.bundle plugin": "skipped"},
    }
    killed = sections["gradients"]["float16"]
    assert (killed["reason"], killed["exit_status"]) == ("illegal address", -11)
    assert f"{script.SECONDS} s" in sections["onnxruntime-cuda"]["x.bundle"]["reason"]
    assert "all fine" in sections["tensorrt-rtx"]["x.bundle"]["reason"]
    command = sections["tensorrt"]["x.bundle plugin"]["command"]
    assert command.endswith("--section tensorrt --part 'x.bundle plugin' x.bundle")
    assert written_before == [1, 2, 3, 4, 5, 6, 7], "written at the end only"
    assert report["machine"] == {"gpu": "a GPU"} and report["bundles"] == ["x.bundle"]
    assert "illegal address" in capsys.readouterr().out


def test_all_passed_is_exit_status_0_and_overwrites_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passed = SimpleNamespace(returncode=0, stdout='{"status": "passed"}', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: passed)
    monkeypatch.setattr(script, "compute_capability", lambda: 86)
    for _ in range(2):
        assert script.main(["x.bundle", "--only", "kernel", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("gpu-*.json"))) == 2


def test_a_runtime_that_is_not_installed_is_skipped(tmp_path: Path) -> None:
    part = ["--section", "tensorrt", "--part", "x.bundle gather", str(tmp_path / "x.bundle")]
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *part], capture_output=True, text=True, cwd=ROOT
    )
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["status"] == "skipped" and "detr-distillery[trt]" in answer["reason"]


def test_a_gpu_the_runtime_does_not_know_is_skipped(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detr(*_: object) -> None:
        raise RuntimeError("-m detr: error[compute-capability]: tensorrt-rtx does not build for 90")

    monkeypatch.setattr(script, "load", lambda backend: None)
    monkeypatch.setattr(script, "detr", detr)
    answer = script.answer("tensorrt-rtx", "x.bundle", [Path("x.bundle")])
    assert answer["status"] == "skipped" and "for 90" in answer["reason"]


def test_what_was_found_before_a_failure_is_kept(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = {"status": "accepted"}
    monkeypatch.setattr(script, "load", lambda backend: None)
    monkeypatch.setattr(script, "detr", lambda *_: evidence)
    answer = script.answer("tensorrt-rtx", "gone.bundle", [Path("gone.bundle")])
    assert answer["status"] == "failed" and "model-missing" in answer["reason"]
    assert answer["result"]["evidence"] == evidence


def test_a_failing_part_says_why_and_where(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.SECTIONS, "kernel", lambda bundles: {"bad": lambda: 1 // 0})
    answer = script.answer("kernel", "bad", [])
    assert answer["reason"] == "integer division or modulo by zero"
    assert any("ZeroDivisionError" in line for line in answer["traceback"])


def test_machine_tells_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    told = gpu_check.machine()
    assert (told["packages"]["numpy"] and "not read" in told["gpu"]) or told["gpu"]
    assert set(told) >= {"gpu", "compute_capability", "cuda_driver", "clocks"}


def test_commands_take_their_options(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only runs on a GPU is at least typed right."""
    import click

    from detr.cli import main

    typed: list[list[str]] = []
    monkeypatch.setattr(script, "detr", lambda *words: typed.append([str(w) for w in words]))
    monkeypatch.setattr(script, "load", lambda backend: None)
    info = SimpleNamespace(model=SimpleNamespace(preprocess=PreprocessConfig(size=(96, 320))))
    monkeypatch.setattr(script, "open_bundle", lambda path: SimpleNamespace(info=info))
    monkeypatch.setattr(script.Path, "glob", lambda *_: [1])
    monkeypatch.setattr(script, "generate", lambda *_, **__: None)
    script.exported(Path("folder"))
    for section in ("kernel", "report", "tensorrt"):
        for part in script.SECTIONS[section]([Path("x.bundle")]):
            script.answer(section, part, [Path("x.bundle")])
    assert {" ".join(words[:2]) for words in typed} == {
        "export onnx", "export trt", "bench op", "bench run"
    }  # fmt: skip
    for words in typed:
        command: Any = main
        while isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words.pop(0))
        command.make_context("x", words)


def test_make_runs_it() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "gpu-check: install\n" in text and "python -m tools.gpu_check $(BUNDLES)" in text
