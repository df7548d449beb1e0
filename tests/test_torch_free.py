"""What a target runs imports without torch and without anything else of the training extra."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = ("torch", "torchvision", "timm", "safetensors", "scipy", "onnxscript", "tensorboard")
# Rooms of the base install, and the parts of the core they stand on.
ROOMS = ("engines", "bench", "detr.data", "detr.msda")
CORE = (
    "detr.cli",
    "detr.cli_support",
    "detr.config",
    "detr.errors",
    "detr.files",
    "detr.model_info",
)

BLOCK = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])

sys.meta_path.insert(0, Blocker())
"""


def modules() -> list[str]:
    found = list(CORE)
    for room in ROOMS:
        folder = ROOT / room.replace(".", "/")
        found += [room, *(m.name for m in pkgutil.walk_packages([str(folder)], prefix=f"{room}."))]
    return [name for name in found if not name.endswith("_native")]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code], capture_output=True, text=True, cwd=ROOT
    )


def test_every_module_a_target_runs_imports_without_torch() -> None:
    names = modules()
    assert {"engines.torch_engine", "bench.run", "detr.data.open"} <= set(names)
    done = run(f"for name in {names}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "predict"),
        (["predict", "--help"], 0, "Example:"),
        (["bench", "--help"], 0, "Example:"),
        (["bench", "run", "--help"], 0, "--rebuild"),
        (["export", "triton", "--help"], 0, "Example:"),
        (["export", "cpp", "--help"], 0, "Example:"),
    ],
)
def test_command_line_answers_without_torch(arguments: list[str], status: int, said: str) -> None:
    done = run(f"from detr.cli import main; main({arguments}, prog_name='detr')")
    assert done.returncode == status, done.stderr
    assert said in done.stdout


def test_a_checkpoint_without_torch_names_the_extra(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    for file in (tmp_path / "x.safetensors", tmp_path / "x.json", image):
        file.touch()
    done = run(
        "from detr.cli import main\n"
        f"main(['predict', {str(tmp_path / 'x.safetensors')!r}, {str(image)!r}], prog_name='detr')"
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error[extra-missing]")
    assert "detr-distillery[train]" in done.stderr


def test_an_export_without_torch_names_the_extra() -> None:
    done = run("from detr.cli import main; main(['export', 'onnx', 'x', '--out', 'y'])")
    assert done.returncode == 2
    assert done.stderr.startswith("error[extra-missing]: this command needs torch")
    assert done.stderr.count("\n") == 1
