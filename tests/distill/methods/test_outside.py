"""Methods that live outside the package, found by module and class."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from detr.cli import main
from detr.data import open_dataset
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from distill.analysis.compare_methods import cell_recipe
from distill.methods import METHODS, find_method, parse_methods
from distill.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[3]
METHOD = """
from detr.config import Strict
from distill.methods import Method

class Options(Strict):
    weight: float = 1.0

class Mine(Method[Options]):
    name = "mine"
    def losses(self, step):
        return {}

class Twin(Mine):
    pass

class Unfinished(Method[Options]):
    name = "unfinished"

class Nameless(Method[Options]):
    def losses(self, step):
        return {}

def function(): ...
"""


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a package of methods; nothing of it stays imported."""
    package = tmp_path / "outside_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(METHOD)
    (package / "needy.py").write_text("import outside_missing_library\n")
    (package / "broken.py").write_text("x = 1\ny = x / 0\n")
    (package / "wrong.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("outside_package")]:
        del sys.modules[name]


def section(text: str, language: str) -> str:
    """The only block of a language in the method's part of CONTRIBUTING.md."""
    part = text.split("## Add a distillation method")[1].split("\n## ")[0]
    (block,) = re.findall(rf"^ *```{language}\n(.*?)^ *```", part, re.DOTALL | re.MULTILINE)
    return "".join(line.removeprefix("   ") for line in block.splitlines(keepends=True))


@pytest.mark.slow
def test_the_recipe_in_contributing_runs_from_another_folder(tiny: Recipe, tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "scores.py").write_text(section(text, "python"))
    settings = tiny.model_dump(mode="json") | {"steps": 2, "name": "scores"}
    student = yaml.safe_load(section(text, "yaml"))
    assert student.pop("base") == "demo-student" and student["teacher"] == "runs/teacher"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | student))
    classes = open_dataset(tiny.data.train).classes
    teacher = build_detector(tiny.detector.for_classes(len(classes)))
    info = ModelInfo(detector=teacher.config, classes=classes, preprocess=tiny.input)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    save_model(tmp_path / "runs" / "teacher" / "model.safetensors", teacher, info)
    # As the installed command: what it finds is in the current folder, not beside the program.
    call = "import sys; sys.path.remove(''); from detr.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", call, "distill", "run", "recipe.yaml", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    # Twice the mean entropy of scores that a fresh head puts near 0.01.
    assert 0 < rows[0]["scores/class"] < 1
    sidecar = json.loads((tmp_path / "out" / "model.json").read_text())
    assert sidecar["provenance"]["methods"] == ["my_package.scores:Scores"]


def test_options_are_checked_as_for_any_other(folder: Path, tiny: Recipe) -> None:
    place = "outside_package.mine:Mine"
    ((kind, options),) = parse_methods([{place: {"weight": 2}}])
    assert kind.name == "mine" and options.model_dump() == {"weight": 2.0}
    assert find_method(place) is kind and place not in METHODS
    with pytest.raises(UserError, match=r"methods\.mine\.wieght: .* 'weight'") as error:
        parse_methods([{place: {"wieght": 2}}])
    assert error.value.code == "method-option"
    with pytest.raises(UserError) as error:
        parse_methods([{place: {}}, {"outside_package.mine:Twin": {}}])
    assert error.value.code == "method-twice"
    with pytest.raises(ValueError, match="need a teacher"):
        Recipe.model_validate({**tiny.model_dump(), "methods": [place]})


def test_overrides_reach_it(folder: Path, tiny: Recipe) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**tiny.model_dump(mode="json"), "teacher": "x"}))
    place = "outside_package.mine:Mine"
    loaded = load_recipe(path, [f"methods=[{place}]", f"methods.0.{place}.weight=3"])
    assert loaded.methods == ({place: {"weight": 3}},)
    cell = cell_recipe(loaded, place, 0)
    assert cell.methods == loaded.methods


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("outside_nowhere.mine:Mine", "method-module", "no module outside_nowhere, neither in"),
        ("outside_package.other:Mine", "method-module", "no module outside_package.other"),
        ("outside_package.needy:Mine", "method-module", r"needy\.py:1: .*outside_missing_library"),
        ("outside_package.broken:Mine", "method-module", r"broken\.py:2: ZeroDivisionError"),
        ("outside_package.wrong:Mine", "method-module", r"wrong\.py:1: SyntaxError"),
        ("outside_package.mine:", "method-module", "is not module:Class"),
        (":Mine", "method-module", "is not module:Class"),
        ("outside_package.mine:Mien", "method-class", r"mine\.py has no Mien; did you mean Mine"),
        ("outside_package.mine:function", "method-class", "is no class derived from"),
        ("outside_package.mine:Options", "method-class", "is no class derived from"),
        ("outside_package.mine:Unfinished", "method-class", "does not define losses"),
        ("outside_package.mine:Nameless", "method-class", "has no name"),
        ("outside_package", "method-unknown", "module:Class"),
    ],
)
def test_what_is_no_method_is_told_in_one_line(
    place: str, code: str, words: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse_methods([{place: {}}])
    assert error.value.code == code and "\n" not in error.value.message


def test_nothing_in_the_current_folder_stands_in_for_a_package(folder: Path) -> None:
    (folder / "torch.py").write_text("raise RuntimeError('the wrong one')\n")
    with pytest.raises(UserError, match=r"torch/__init__\.py has no Mine") as error:
        find_method("torch:Mine")
    assert error.value.code == "method-class"
    assert find_method("outside_package.mine:Mine").name == "mine"
    assert torch.__name__ == "torch"


def test_the_command_tells_and_its_list_is_unaffected(folder: Path, tiny: Recipe) -> None:
    recipe: dict[str, Any] = {**tiny.model_dump(mode="json"), "teacher": "x"}
    recipe["methods"] = ["outside_package.mine:Mien"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["distill", "run", "recipe.yaml"])
    assert done.exit_code == 2 and "error[method-class]" in done.stderr
    done = CliRunner().invoke(main, ["distill", "methods", "--json"])
    assert list(json.loads(done.stdout)) == list(METHODS)
