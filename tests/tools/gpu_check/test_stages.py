"""The stages of gpu-check, run as far as a machine without a GPU can.

On the CPU's operator, on a stand-in for the driver whose kernels run on the host, and on a stand-in
for CUDA's runtime: so no line of them is run for the first time where time is short.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "msda"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "engines"))
from fake_driver import compile_driver, compile_kernels, environment
from trt_stand_ins import Cuda, Error

from bench.op import msda as op
from detr.models.attention import ms_deform_attn as operator
from engines.msda_plugin import attention_of
from tools.gpu_check import correctness, plugin, problems, runner, sanitized, sanitizer, training
from tools.gpu_check.part import Setting, answer
from tools.gpu_check.process import ROOT
from tools.gpu_check.timing import timing

CPU = Setting("cpu")
COMPILERS = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") and shutil.which("g++")),
    reason="no C and C++ compilers",
)


@pytest.mark.slow
@pytest.mark.parametrize("part", correctness.correctness(CPU))
def test_the_cpus_operator_is_right_in_every_case(part: str, capsys: Any) -> None:
    told = answer(correctness.correctness(CPU)[part])
    assert told["status"] == "passed", told
    cases = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all("failed" not in case and "skipped" not in case for case in cases)
    assert len(cases) == {"widths": 11, "calls": 7, "large": 3}.get(part.split()[0], 0)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("widths float16", lambda found: found * 1.002),
        ("calls float32", lambda found: found * (1 + 1e-5)),
        ("large", lambda found: torch.cat([found[..., :-1], found[..., -1:] + 1], -1)),
    ],
)
def test_an_operator_that_is_a_little_off_is_found(
    monkeypatch: pytest.MonkeyPatch, part: str, wrong: Any
) -> None:
    right = operator.ms_deform_attn
    for module in (problems, correctness):
        monkeypatch.setattr(module, "ms_deform_attn", lambda *given: wrong(right(*given)))
    told = answer(correctness.correctness(CPU)[part])
    assert told["status"] == "failed" and "more than 1" in told["reason"], told


def test_a_gradient_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Any) -> Any:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0] * 1.01

    right = operator.ms_deform_attn
    monkeypatch.setattr(
        correctness,
        "ms_deform_attn",
        lambda value, *rest: right(Off.apply(value), *rest),
    )
    told = answer(correctness.correctness(CPU)["gradcheck"])
    assert told["status"] == "failed" and "Jacobian mismatch" in told["reason"], told


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cuda.bindings.nvrtc")
    return compile_driver(tmp_path_factory.mktemp("driver"))


def on_stand_in(
    driver: Path, module: list[str], **more: str
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    done = subprocess.run(
        [sys.executable, "-m", *module],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(driver, **more),
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line.replace("'", '"')) for line in lines], done


@COMPILERS
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_plugins_ptx_is_launched_as_tensorrt_does(
    driver: Path, tmp_path: Path, dtype: str
) -> None:
    """Real NVRTC, real marshalling; the kernel's own code runs, its fibers in place of a GPU's."""
    tokens = sum(height * width for height, width in plugin.SMALL)
    attention = attention_of(
        dtype,
        (-1, tokens, plugin.HEADS, plugin.CHANNELS),
        (-1, 5, plugin.HEADS, len(plugin.SMALL), plugin.POINTS),
        [size for shape in plugin.SMALL for size in shape],
    )
    part = ["tools.gpu_check", "--part", "plugin", f"small {dtype}"]
    kernels = str(compile_kernels(attention, tmp_path))
    told, done = on_stand_in(driver, part, FAKE_CUDA_KERNELS=kernels)
    assert told[-1]["status"] == "passed", done
    assert told[-1]["result"]["ptx"][1] == "6.3"
    assert [case["case"] for case in told[:-1]] == ["batch 1", "batch 3"]
    notes = (driver / "log").read_text()
    assert "load //" in notes and notes.count("launch forward") == 2
    # Without kernels nothing is written, and that is not taken for an answer.
    told, _ = on_stand_in(driver, part, FAKE_CUDA_KERNELS="none")
    assert told[-1]["status"] == "failed", told
    told, _ = on_stand_in(driver, part, FAKE_CUDA_FAIL="cuLibraryLoadData=222")
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in told[-1]["reason"]


@COMPILERS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "status", "words"),
    [
        ("cuInit=100", "skipped", "CUDA_ERROR_NO_DEVICE"),
        ("cuMemAlloc=2", "failed", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuLaunchKernel=1", "failed", "CUDA_ERROR_INVALID_VALUE"),
        ("cuStreamSynchronize=700", "failed", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuMemcpyDtoH=719", "failed", "CUDA_ERROR_LAUNCH_FAILED"),
    ],
)
def test_each_error_of_the_driver_is_told(driver: Path, fail: str, status: str, words: str) -> None:
    """Where it happens: while memory is taken, at the launch, or once the kernel is waited for."""
    part = ["tools.gpu_check", "--part", "plugin", "small float32"]
    told, done = on_stand_in(driver, part, FAKE_CUDA_FAIL=fail, FAKE_CUDA_KERNELS="none")
    assert done.returncode == 0 and told[-1]["status"] == status, done
    assert words in told[-1]["reason"]


@COMPILERS
@pytest.mark.slow
@pytest.mark.parametrize("kind", sanitized.KINDS)
def test_the_sanitized_program_runs_both_kernels(driver: Path, tmp_path: Path, kind: str) -> None:
    kernels = str(compile_kernels(sanitized.attention(kind), tmp_path))
    program = ["tools.gpu_check.sanitized", kind]
    told, done = on_stand_in(driver, program, FAKE_CUDA_KERNELS=kernels, FAKE_CUDA_CAPABILITY="90")
    assert done.returncode == 0 and set(told[0]) == {"out", "value", "locations", "weights"}, done
    notes = (driver / "log").read_text()
    assert "load \x7fELF" in notes and "launch backward" in notes
    _, done = on_stand_in(driver, program, FAKE_CUDA_KERNELS="none")
    assert done.returncode == 1 and "is allowed" in done.stderr


@pytest.mark.parametrize(
    ("says", "status", "reason"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed", ""),
        ("echo '========= COMPUTE-SANITIZER'; echo '========= Invalid read'; exit 9", "failed",
         "Invalid read"),
        ("echo 'Device not supported'; exit 1", "skipped", "not supported"),
        ("echo broken >&2; exit 3", "failed", "exit status 3: broken"),
        ("echo nothing", "failed", "exit status 0: nothing"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says_is_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, status: str, reason: str
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!/bin/sh\n[ \"$1 $5 $6\" = '--tool {sys.executable} -m' ] || exit 8\n{says}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    parts = sanitizer.sanitizer(Setting("cuda"))
    assert sum("memcheck" in name for name in parts) == len(sanitized.KINDS)
    told = answer(parts["racecheck float32-32-fixed"])
    assert told["status"] == status and reason in told.get("reason", ""), told


class Recorder(Cuda):
    """CUDA's runtime with copies on the device, and with waiting that ends a recording."""

    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong, self.void = wrong, False

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[Error]:
        if self.wrong == "copies at once" and self.recording is not None:
            return (Error(0),)  # it was not recorded, so a replay leaves it out
        if kind == 2 and self.wrong == "short":
            size -= 1
        return self.do(f"copy {size}", lambda: ctypes.memmove(to, source, size))

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        self.void = self.void or self.recording is not None
        return (Error(900 if self.recording is not None else 0),)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        recorded, self.recording = self.recording, None
        void, self.void = self.void, False
        return Error(901 if void else 0), recorded

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        taken = sum(len(block) for block in self.blocks.values())
        return Error(0), 2**40 - taken, 2**40

    def cudaFree(self, pointer: int) -> tuple[Error]:
        return (Error(0),) if self.wrong == "keeps" else super().cudaFree(pointer)

    cudaFreeHost = cudaFree


def test_the_runner_holds_around_a_stand_in() -> None:
    assert runner.check(Recorder()) == "6 cases"


@pytest.mark.parametrize(
    ("wrong", "case"),
    [("copies at once", "batches"), ("short", "batches"), ("keeps", "given_back")],
)
def test_a_runner_that_is_wrong_is_found(wrong: str, case: str) -> None:
    with pytest.raises(RuntimeError, match=case):
        runner.check(Recorder(wrong))


@pytest.mark.slow
def test_times_are_told_case_by_case(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(op, "_ROUNDS", 1)
    monkeypatch.setitem(op.PRESETS, "kitti-decoder", op.AttentionPreset(((6, 9), (3, 4)), 20))
    told = answer(timing(CPU)["kitti-decoder"])
    assert told == {"status": "passed", "result": "3 cases"}
    cases = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [case["case"] for case in cases] == ["x1 float32", "x1 float16", "x1 bfloat16"]
    assert all(case["forward_ms"] > 0 and case["times_faster"] > 0 for case in cases)


@pytest.mark.slow
def test_the_same_steps_have_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 3)
    told = answer(training.training(CPU)["off"])
    assert told["status"] == "passed", told
    assert told["result"]["cpu"] == told["result"]["device"] and len(told["result"]["cpu"]) == 3
    curves = iter([[5.0, 4.0, 3.0], [5.0, 4.1, 3.0]])
    monkeypatch.setattr(training, "losses", lambda *_: next(curves))
    told = answer(training.training(CPU)["off"])
    assert told["status"] == "failed" and "0.025 at first" in told["reason"]


def test_without_a_gpu_the_parts_are_skipped() -> None:
    for parts in (plugin.plugin(CPU), runner.runner(CPU)):
        for part in parts.values():
            assert answer(part)["status"] == "skipped"
    if not torch.cuda.is_available():
        told = answer(correctness.correctness(Setting("cuda"))["gradcheck"])
        assert told["status"] == "skipped" and "no CUDA device" in told["reason"]
