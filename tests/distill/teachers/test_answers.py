"""Answers kept on disk: the very weights of a run that asks, and no teacher the second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from detr.config import DetectorConfig
from detr.errors import UserError
from detr.models import GroupOutput, TeacherPart, build_detector
from detr.models.protocol import EVERYTHING, WITHOUT_MASKS
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


@pytest.mark.parametrize("kind", ["masks", "masks unread", "edges"])
def test_answers_of_every_kind_are_found_again(
    kind: str, small_preset: Callable[..., DetectorConfig], tmp_path: Path
) -> None:
    config = small_preset("d-fine" if kind == "edges" else "mask-dino")
    teacher = build_detector(config, pretrained=False).eval()
    needs = EVERYTHING if kind == "masks" else WITHOUT_MASKS
    images, valid = torch.randn(2, 3, 128, 128), torch.tensor([[128.0, 128.0], [100.0, 80.0]])
    asked = False
    say: list[str] = []

    def answer(needs: frozenset[TeacherPart]) -> tuple[GroupOutput, bool]:
        nonlocal asked
        asked = False
        stored = answers.StoredAnswers(teacher, "digest", tmp_path, needs, say.append)
        with torch.no_grad():
            memory = stored.encode(images, valid)
            (output,) = stored.decode(memory, stored.queries(memory))
        return output, asked

    def encode(*given: Any, original: Any = teacher.encode) -> Any:
        nonlocal asked
        asked = True
        return original(*given)

    teacher.encode = encode  # type: ignore[method-assign]
    with torch.no_grad():
        memory = teacher.encode(images, valid)
        (wanted,) = teacher.decode(memory, teacher.queries(memory))
    first, again = answer(needs), answer(needs)
    assert first[1] and not again[1] and not say
    for found, _ in (first, again):
        assert torch.equal(found.boxes[-1], wanted.boxes[-1])
        if kind == "masks":
            assert torch.equal(found.mask_logits(), wanted.mask_logits())
        else:
            assert found.masks == [] and found.pixels is None
        if kind == "edges":
            assert found.first is not None and wanted.first is not None
            assert found.first.refinement == wanted.first.refinement
            assert torch.equal(found.first.boxes, wanted.first.boxes)
    if kind == "masks unread":
        # Who needs masks does not find answers without.
        assert torch.equal(answer(EVERYTHING)[0].mask_logits(), wanted.mask_logits())
