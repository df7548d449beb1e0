"""``export trt``: what is refused, built, verified and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from detr.errors import GateError
from detr.files import sha256
from engines.bundle import Bundle, open_bundle
from engines.evidence import Evidence, read_evidence
from engines.trt.backend import BACKENDS
from engines.trt.build import BuildOptions, BuiltEngine
from engines.trt.layers import Layer, LayerReport
from export.cli import main
from export.deploy import tensorrt as command
from export.parity import gate

MakeBundle = Callable[..., Path]
FORMAT1 = Path(__file__).parent / "format1" / "engine-evidence.json"
BUILD: dict[str, Any] = json.loads(FORMAT1.read_text())["build"]


CAST = Layer(name="cast", kind="CAST", inputs=("FLOAT",), outputs=("HALF",), shape=(1,))


class Runner:
    """Answers for the builder, the runner and the gate; keeps what it was asked."""

    def __init__(self) -> None:
        self.not_run_because: str | None = None
        self.status = "accepted"
        self.options: BuildOptions | None = None
        self.asked: list[Any] = []

    def build(self, bundle: Bundle, backend: Any, options: BuildOptions) -> BuiltEngine:
        self.options = options
        folder = bundle.path / "engines" / backend.name
        folder.mkdir(parents=True)
        (folder / "model.engine").write_bytes(b"engine")
        evidence = Evidence(
            artifact="model.engine",
            sha256=sha256(folder / "model.engine"),
            bundle_sha256=bundle.info.fingerprint,
            backend=backend.name,
            build=BUILD
            | {
                "precision": "fp32",
                "lowering": "plugin",
                "batch": [1, 1, 4],
                "bytes": 6,
                "memory_bytes": {"device": 2**21},
                "seconds": 3.0,
                "not_run_because": self.not_run_because,
            },
        )
        evidence.write(folder)
        return BuiltEngine(
            folder, evidence, LayerReport(counts={"CAST": {"HALF": 2}}, layers=(CAST, CAST))
        )

    def open(self, bundle: Bundle, engine: str, ungated: bool, built: Path) -> Any:
        assert ungated, "nobody has compared it yet"
        assert (built / "model.engine").exists()
        self.asked.append("open")
        return self

    def prepare(self, images: Any) -> Any:
        return images

    def profile_layers(self, inputs: Any) -> dict[str, float]:
        assert len(inputs) == 1
        return {"conv": 0.5}

    def gate(self, bundle: Bundle, data: str | None, engines: list[Any]) -> Runner:
        assert engines == [self]
        self.asked.append(data)
        folder = next(bundle.path.glob("engines/*"))
        read_evidence(folder).model_copy(update={"status": self.status}).write(folder)
        return self

    def check(self) -> None:
        if self.status == "rejected":
            raise GateError("parity-rejected", "boxes are off")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    made = Runner()
    monkeypatch.setattr(command, "build_engine", made.build)
    monkeypatch.setattr(command, "open_engine", made.open)
    monkeypatch.setattr(command, "refuse_known_bad", lambda *_: None)
    monkeypatch.setattr(gate, "gate_bundle", made.gate)
    return made


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["trt", *map(str, arguments)], catch_exceptions=False)


def test_an_engine_that_can_run_is_verified_at_once(toy_bundle: MakeBundle, runner: Runner) -> None:
    result = run(toy_bundle(), "--data", "kitti:somewhere", "--timing-cache", "tactics")
    assert result.exit_code == 0, result.output
    assert runner.asked == ["open", "kitti:somewhere"]
    assert runner.options == BuildOptions(timing_cache=Path("tactics"))
    assert (
        "accepted; fp32, plugin, batch 1-1-4" in result.stdout and "2 MiB device" in result.stdout
    )
    assert "2 HALF" in result.stdout


def test_one_that_deviates_exits_with_3_and_stays_rejected(
    toy_bundle: MakeBundle, runner: Runner
) -> None:
    bundle = toy_bundle()
    runner.status = "rejected"
    result = run(bundle, "--json")
    assert result.exit_code == 3 and "error[parity-rejected]: boxes are off" in result.stderr
    assert json.loads(result.stdout)["status"] == "rejected"
    folder = bundle / "engines" / "tensorrt"
    assert read_evidence(folder).status == "rejected"
    assert json.loads((folder / "layers.json").read_text())["milliseconds"] == {"conv": 0.5}


def test_one_for_another_gpu_is_left_unverified_and_says_so(
    toy_bundle: MakeBundle, runner: Runner
) -> None:
    runner.not_run_because = "no CUDA device on the machine that built it"
    options = ["--backend", "tensorrt-rtx", "--compute-capability", "89,86"]
    result = run(toy_bundle(), *options, "--lowering", "gridsample", "--profile-batch", "1,2,8")
    assert result.exit_code == 0 and runner.asked == []
    assert "unverified (no CUDA device on the machine" in result.stdout
    assert runner.options == BuildOptions("gridsample", (89, 86), profile_batch=(1, 2, 8))


def test_verification_can_be_left_out(toy_bundle: MakeBundle, runner: Runner) -> None:
    result = run(toy_bundle(), "--no-verify", "--version-compatible", "--hardware-compatible")
    assert result.exit_code == 0 and runner.asked == [] and "unverified;" in result.stdout
    assert runner.options == BuildOptions(version_compatible=True, hardware_compatible=True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--compute-capability", "8.6"], "option-numbers"),
        (["--profile-batch", "1,x"], "option-numbers"),
        (["--profile-batch", "1,4"], "option-batch"),
    ],
)
def test_numbers_that_are_none(
    toy_bundle: MakeBundle, runner: Runner, arguments: list[str], code: str
) -> None:
    result = run(toy_bundle(), *arguments)
    assert result.exit_code == 2 and f"error[{code}]" in result.stderr


def test_what_is_known_to_come_out_wrong_is_not_built(
    toy_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(toy_bundle())

    class Module:
        __version__ = "11.4.0.106"

    monkeypatch.setattr(command, "load", lambda backend: Module)
    monkeypatch.setattr(command, "compute_capability", lambda: 87)
    with pytest.raises(GateError, match="--lowering gather") as error:
        command.refuse_known_bad(bundle, BACKENDS["tensorrt"], BuildOptions("gridsample"))
    assert error.value.code == "known-bad" and error.value.exit_status == 3
    assert "issues/4813" in str(error.value) and "11.4.0.106" in str(error.value)
    for options in (BuildOptions("gather"), BuildOptions("plugin"), BuildOptions()):
        command.refuse_known_bad(bundle, BACKENDS["tensorrt"], options)
    half = replace(bundle, info=bundle.info.model_copy(update={"precision": "fp16"}))
    Module.__version__ = "10.13.3.9"
    with pytest.raises(GateError, match="Jetson Orin"):
        command.refuse_known_bad(half, BACKENDS["tensorrt"], BuildOptions())
    monkeypatch.setattr(command, "compute_capability", lambda: 86)
    command.refuse_known_bad(half, BACKENDS["tensorrt"], BuildOptions())
