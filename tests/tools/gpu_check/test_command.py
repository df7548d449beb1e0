"""``make gpu-check`` says so without a GPU; one part's failure loses no other's result."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detr.data.preprocess import PreprocessConfig
from tools.gpu_check import __main__ as command
from tools.gpu_check import artifacts, machine, plan, process
from tools.gpu_check.part import Cases, Setting, Skipped, answer

ROOT = Path(__file__).resolve().parents[3]
BUNDLE = Setting("cuda", (Path("x.bundle"),))


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "machine", lambda: {"gpu": "a GPU"})
    monkeypatch.setattr(command, "compute_capability", lambda: 86)


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(command, "compute_capability", lambda: None)
    assert command.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[device-missing]: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_each_part_is_recorded_on_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """One passes, one is killed by a signal, one hangs, one babbles, one is not installed."""
    written_before: list[int] = []
    limits: dict[str, float] = {}

    def ended(typed: list[str], seconds: float, out: Any, err: Any) -> int | None:
        files = list(tmp_path.glob("gpu-*.json"))
        stages = json.loads(files[0].read_text())["stages"].values() if files else []
        written_before.append(sum(len(parts) for parts in stages))
        stage, part = typed[typed.index("--part") + 1 :][:2]
        limits[stage] = seconds
        if part == "x.bundle gather":
            out.write('{"case": "first", "error": 0.5}\n')
            err.write("a\nillegal address\n")
            return -11
        if stage == "onnxruntime-cuda":
            out.write('{"case": "first", "error": 0.5}\n{"case"')
            return None
        if stage == "tensorrt-rtx":
            out.write("all fine\n")
            return 0
        status = {"x.bundle plugin": "skipped"}.get(part, "passed")
        told = json.dumps({"status": status, "reason" if status == "skipped" else "result": "r"})
        out.write(f"a library's greeting\n{told}\n")
        return 0

    monkeypatch.setattr(process, "ended", ended)
    names = ["runner", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
    assert command.main(["x.bundle", "--out", str(tmp_path), "--only", *names]) == 1
    (path,) = tmp_path.glob("gpu-20??-??-??.json")
    report = json.loads(path.read_text())
    stages = report["stages"]
    assert {n: {k: e["status"] for k, e in parts.items()} for n, parts in stages.items()} == {
        "runner": {"runner": "passed"},
        "onnxruntime-cuda": {"x.bundle": "failed"},
        "tensorrt-rtx": {"x.bundle": "failed"},
        "tensorrt": {"x.bundle gather": "failed", "x.bundle plugin": "skipped"},
    }
    killed = stages["tensorrt"]["x.bundle gather"]
    assert (killed["reason"], killed["exit_status"]) == ("illegal address", -11)
    hung = stages["onnxruntime-cuda"]["x.bundle"]
    assert hung["reason"] == f"not done after {limits['onnxruntime-cuda']:.0f} s"
    assert limits["onnxruntime-cuda"] == plan.STAGES["onnxruntime-cuda"].seconds
    # What a part told before it was killed or hung is kept.
    assert killed["cases"] == hung["cases"] == [{"case": "first", "error": 0.5}]
    assert "told no result" in stages["tensorrt-rtx"]["x.bundle"]["reason"]
    typed = stages["tensorrt"]["x.bundle plugin"]["command"]
    assert "--part tensorrt 'x.bundle plugin' --device cuda " in typed
    assert written_before == [0, 1, 2, 3, 4], "written at the end only"
    assert report["machine"] == {"gpu": "a GPU"} and report["bundles"] == ["x.bundle"]
    assert "illegal address" in capsys.readouterr().out


def test_all_passed_is_exit_status_0_and_overwrites_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passed = {"status": "passed", "seconds": 1.0}
    monkeypatch.setattr(command, "run_part", lambda *_: passed)
    for _ in range(2):
        assert command.main(["x.bundle", "--only", "timing", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("gpu-*.json"))) == 2


def test_the_time_for_all_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The part at the limit gets what is left, those after it are told and not begun."""
    now, limits = [0.0], []

    def run_part(stage: str, part: str, setting: Setting, seconds: float) -> dict[str, Any]:
        limits.append(seconds)
        now[0] += 100
        return {"status": "passed", "seconds": 100.0}

    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(command, "run_part", run_part)
    options = ["x.bundle", "--only", "timing", "plugin", "--seconds", "250"]
    assert command.main([*options, "--out", str(tmp_path)]) == 0
    assert limits == [180, 150, 50]
    (path,) = tmp_path.iterdir()
    last = json.loads(path.read_text())["stages"]["plugin"].values()
    assert {entry["reason"] for entry in last} == {"no time left"} and len(last) == 6


def test_a_stage_whose_modules_are_missing_keeps_none_from_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tools.gpu_check.correctness", None)
    told = plan.planned(["correctness", "runner"], Setting("cuda"))
    assert told[0][:2] == ("correctness", None) and "not installed" in told[0][2]
    assert told[1] == ("runner", "runner", None)


@pytest.fixture
def lasting(tmp_path: Path) -> Iterator[list[str]]:
    """A command that starts another one and tells its id; both last longer than any test."""
    yield ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/id; wait"]


def _lives(process_id: int) -> bool:
    """Whether a process runs; one that waits to be fetched by its parent does not."""
    try:
        return ") Z" not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("by_itself", [False, True])
def test_what_a_part_started_ends_with_it(
    tmp_path: Path, lasting: list[str], by_itself: bool
) -> None:
    """Also where the part itself ended in time."""
    if by_itself:
        lasting[-1] = lasting[-1].replace("; wait", "")
    begin = time.monotonic()
    with (tmp_path / "out").open("w") as out:
        status = process.ended(lasting, 60 if by_itself else 1, out, out)
    assert status == (0 if by_itself else None) and time.monotonic() - begin < 50
    started = int((tmp_path / "id").read_text())
    for _ in range(100):
        if not _lives(started):
            break
        time.sleep(0.1)
    else:
        os.kill(started, 9)
        pytest.fail("it lives on")


@pytest.mark.slow
def test_parts_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes, cases and file for real, on the CPU's operator."""
    plan_ = [("correctness", "large", None), ("runner", "runner", None)]
    monkeypatch.setattr(command, "planned", lambda *_: plan_)
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    stages = json.loads(path.read_text())["stages"]
    assert stages["correctness"]["large"]["status"] == "passed"
    assert len(stages["correctness"]["large"]["cases"]) == 3
    assert stages["runner"]["runner"]["status"] == "skipped"


def test_a_failing_case_lets_the_others_run_and_fails_the_part(capsys: Any) -> None:
    def part() -> str:
        cases = Cases()
        cases.run("fine", lambda: {"error": 0.5}, 1)
        cases.run("large", lambda: {"error": 2.0}, 1)
        cases.run("no number", lambda: {"error": float("nan")}, 1)
        cases.run("raises", lambda: {"error": 1 / 0}, 1)
        cases.run("time", lambda: {"ms": 2000.0})

        def skipped() -> dict[str, float]:
            raise Skipped("no memory")

        cases.run("skips", skipped, 1)
        return cases.finish()

    told = answer(part)
    assert told["status"] == "failed" and told["reason"].startswith("3 of 6 failed; large: more")
    cases = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [case.get("failed", "")[:4] for case in cases] == ["", "more", "more", "Zero", "", ""]


def test_a_failing_part_says_why_and_where() -> None:
    told = answer(lambda: 1 // 0)
    assert told["reason"] == "integer division or modulo by zero"
    assert any("ZeroDivisionError" in line for line in told["traceback"])


def test_a_gpu_the_runtime_does_not_know_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def detr(*_: object) -> None:
        raise RuntimeError("-m detr: error[compute-capability]: tensorrt-rtx does not build for 90")

    monkeypatch.setattr(artifacts, "load", lambda backend: None)
    monkeypatch.setattr(artifacts, "open_bundle", lambda path: None)
    monkeypatch.setattr(artifacts, "detr", detr)
    told = answer(lambda: artifacts.built(tmp_path, "tensorrt-rtx", "gather"))
    assert told["status"] == "skipped" and "for 90" in told["reason"]


@pytest.mark.parametrize("status", ["accepted", "rejected"])
def test_what_was_found_before_a_failure_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str
) -> None:
    """Of a rejected engine the reasons that its evidence names."""
    evidence = {"status": status, "reasons": ["2 boxes off"] if status == "rejected" else []}
    printed = SimpleNamespace(
        returncode=3 if status == "rejected" else 0, stdout=json.dumps(evidence), stderr="no"
    )
    monkeypatch.setattr(artifacts.subprocess, "run", lambda *_, **__: printed)
    monkeypatch.setattr(artifacts, "load", lambda backend: None)
    monkeypatch.setattr(artifacts, "open_bundle", lambda path: None)
    told = answer(lambda: artifacts.built(tmp_path, "tensorrt-rtx", "gather"))
    wanted = "2 boxes off" if status == "rejected" else "model-missing"
    assert told["status"] == "failed" and wanted in json.dumps(told), told
    assert told["result"]["evidence"] == evidence


def test_a_rejected_engines_evidence_has_the_reasons_it_is_asked_for() -> None:
    """The key exists where the command that prints it is defined."""
    from engines.evidence import Evidence

    assert {"status", "reasons"} <= set(Evidence.model_fields)


def test_a_bundle_that_was_not_exported_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "load", lambda backend: None)
    told = answer(artifacts.tensorrt(BUNDLE)["x.bundle plugin"])
    assert told == {"status": "skipped", "reason": "x.bundle was not exported"}


def test_machine_tells_what_it_can() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    told = machine.machine()
    assert (told["packages"]["numpy"] and "not read" in told["gpu"]) or told["gpu"]
    assert set(told) >= {"gpu", "compute_capability", "cuda_driver", "clocks"}


def test_commands_take_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only runs on a GPU is at least typed right."""
    import click

    from detr.cli import main

    typed: list[list[str]] = []
    monkeypatch.setattr(artifacts, "detr", lambda *words: typed.append([str(w) for w in words]))
    monkeypatch.setattr(artifacts, "load", lambda backend: None)
    info = SimpleNamespace(model=SimpleNamespace(preprocess=PreprocessConfig(size=(96, 320))))
    monkeypatch.setattr(artifacts, "open_bundle", lambda path: SimpleNamespace(info=info))
    monkeypatch.setattr(artifacts.Path, "glob", lambda *_: [1])
    monkeypatch.setattr(artifacts.Path, "exists", lambda _: True)
    monkeypatch.setattr(artifacts, "generate", lambda *_, **__: None)
    two = Setting("cuda", (Path("a.bundle"), Path("b.bundle")))
    for stage in ("export", "report", "tensorrt", "tensorrt-rtx"):
        for part in plan.STAGES[stage].parts(two).values():
            answer(part)
    assert {" ".join(words[:2]) for words in typed} == {"export onnx", "export trt", "bench run"}
    for words in typed:
        found: Any = main
        while isinstance(found, click.Group):
            found = found.get_command(click.Context(found), words.pop(0))
        found.make_context("x", words)


def test_make_runs_it() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "gpu-check: install\n" in text and "python -m tools.gpu_check $(BUNDLES)" in text
