"""Answers kept on disk: the very weights of a run that asks, and no teacher the second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from detr.errors import UserError
from distill.analysis.compare_methods import cell_recipe
from distill.recipe import Recipe
from distill.teachers import answers
from distill.training.loop import train

# Between them they read every part of a teacher: maps of three kinds, queries, attention, and
# answers to queries that are drawn anew in each step.
METHODS: list[dict[str, dict[str, Any]]] = [
    {"clockdistill": {}},
    {"d3etr": {}},
    {"fitnet": {"on": "backbone"}},
    {"fgd": {"on": "neck"}},
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teacher") / "run"


def distilled(tiny: Recipe, teacher: Path, **changes: Any) -> Recipe:
    if not teacher.exists():
        train(tiny.model_copy(update={"steps": 1, "ema": None}), teacher)
    content = tiny.model_dump() | {"teacher": str(teacher), "methods": METHODS, "steps": 3}
    content["data"]["val"] = None
    return Recipe.model_validate(content | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_second_student_asks_no_teacher_and_gets_the_very_weights(
    tiny: Recipe, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = distilled(tiny, teacher)
    train(plain, tmp_path / "plain")
    kept = distilled(tiny, teacher, teacher_answers=str(tmp_path / "answers"))
    train(kept, tmp_path / "first")
    assert same(tmp_path / "plain", tmp_path / "first")

    def asked(*_: Any) -> Any:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(answers.StoredAnswers, "_see", asked)
    train(kept, tmp_path / "second")
    assert same(tmp_path / "plain", tmp_path / "second")
    other = kept.model_dump()
    other["detector"]["decoder"]["layers"] = 1
    train(Recipe.model_validate(other), tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["seed", "teacher", "broken"])
def test_what_does_not_fit_is_not_taken(
    tiny: Recipe, teacher: Path, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "answers"
    # One method is enough, and one whose answers are few.
    kept = distilled(tiny, teacher, teacher_answers=str(folder), methods=[{"kd_detr": {}}])
    train(kept, tmp_path / "first")
    files = sorted(folder.rglob("*.pt"))
    assert files
    if what == "seed":
        changed = kept.model_copy(update={"seed": 1})
    elif what == "teacher":
        other = tmp_path / "teacher"
        train(tiny.model_copy(update={"steps": 1, "ema": None, "seed": 5}), other)
        changed = kept.model_copy(update={"teacher": str(other)})
    else:
        changed = kept
        for file in files:
            file.write_bytes(file.read_bytes()[:-40])
    train(changed, tmp_path / "kept")
    train(changed.model_copy(update={"teacher_answers": None}), tmp_path / "asked")
    assert same(tmp_path / "kept", tmp_path / "asked")


@pytest.mark.slow
def test_a_full_disk_costs_the_answers_and_not_the_run(
    tiny: Recipe, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(path: Path, _: bytes) -> None:
        raise UserError("disk-full", f"{path}: no space left")

    monkeypatch.setattr(answers, "write_atomic", full)
    kept = distilled(tiny, teacher, teacher_answers=str(tmp_path / "a"), methods=[{"kd_detr": {}}])
    train(kept, tmp_path / "run")
    told = capsys.readouterr()
    assert (told.out + told.err).count("stored no more") == 1
    assert weights(tmp_path / "run")


def test_only_where_a_method_asks(tiny: Recipe, tmp_path: Path) -> None:
    content = tiny.model_dump() | {"teacher": "t", "teacher_answers": str(tmp_path)}
    with pytest.raises(ValidationError, match="no method asks"):
        Recipe.model_validate(content)
    recipe = Recipe.model_validate(content | {"methods": [{"qskd": {}}], "inherit": True})
    assert cell_recipe(recipe, "qskd", 0).teacher_answers == str(tmp_path)
    for row in ("baseline", "inherit", "stable_dino"):
        assert cell_recipe(recipe, row, 0).teacher_answers is None
    assert recipe.without_teacher().teacher_answers is None
