"""What a run keeps of its matching, and what ``distill diagnose`` makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from detr.config import ClassMap
from detr.models import (
    GroupOutput,
    Memory,
    QueryGroup,
    Target,
    build_detector,
    load_model,
    save_model,
)
from detr.models.transfer import Source, transfer
from distill.analysis.diagnosis import _queries_above
from distill.analysis.diagnosis_page import curves
from distill.cli import main
from distill.query_owners import Answer, consistency, instability, read_owner_records
from distill.recipe import Recipe
from distill.training.loop import train


def test_instability_by_hand() -> None:
    before = [[4, 7, 9], []]
    assert instability(before, before) == 0
    # Query 4 keeps its object, 7 and 9 swap theirs.
    assert instability(before, [[4, 9, 7], []]) == 1.0  # two changes over two images
    # Object 1 moves from query 7 to query 2: one loses it, the other gains it.
    assert instability(before, [[4, 2, 9], []]) == 1.0
    assert instability(before, [[4, -1, 9], []]) == 0.5


def test_consistency_by_hand() -> None:
    assert consistency([[1, 2], [3, 4]], [[1, 5], [3, 9]]) == 50.0
    assert consistency([[]], [[]]) == 0.0


def test_queries_are_counted_above_thresholds() -> None:
    # GIoU with the one object: itself 1, half of it 0.5, beside it (touching) 0, far off negative.
    boxes = torch.tensor(
        [[[0.3, 0.3, 0.2, 0.2], [0.3, 0.25, 0.2, 0.1], [0.5, 0.3, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]]]
    )
    target = Target(boxes[0, :1], torch.tensor([0]), torch.zeros(0, 4))
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    group = QueryGroup("own", torch.zeros(1, 4, 4), boxes)
    memory: Any = Memory(torch.zeros(1, 1, 4), ((1, 1),), torch.zeros(1, 1), torch.ones(1, 1, 2), 0)  # type: ignore[arg-type]
    output = GroupOutput(group, [torch.zeros(1, 4, 1)], [boxes], [], [])
    answer = Answer([0], [target], torch.ones(1, 2), (1, 1), memory, output)
    assert _queries_above(answer).tolist()[:4] == [1, 1, 2, 2]
    assert _queries_above(answer).tolist()[-1] == 4
    answer.targets = [nothing]
    assert _queries_above(answer).sum() == 0


def test_curves_draw_every_value() -> None:
    drawn = curves({"student": [(0, 1.0), (50, 3.0)], "average": []}, "steps", "AP")
    assert drawn.count("<polyline") == 1 and drawn.count("<title>") == 2
    assert curves({"student": []}, "steps", "AP") == ""


@pytest.mark.slow
def test_a_run_is_diagnosed(tiny: Recipe, tmp_path: Path) -> None:
    recipe = tiny.model_copy(
        update={"validation": tiny.validation.model_copy(update={"every": 2, "images": 1})}
    )
    for name in ("run", "baseline"):
        train(recipe, tmp_path / name)
    kept = read_owner_records(tmp_path / "run" / "matching.jsonl")
    assert [row.step for row in kept] == [2, 4, 6]
    assert all(row.average is not None for row in kept)
    # The same seeds train the same weights, which match the same queries.
    assert kept == read_owner_records(tmp_path / "baseline" / "matching.jsonl")

    command = ["diagnose", str(tmp_path / "run"), "--data", recipe.data.val or "", "--json"]
    command += ["--teacher", str(tmp_path / "baseline")]
    command += ["--baseline", str(tmp_path / "baseline")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert json.loads(result.stdout) == found
    assert found["images"] == 2 and found["objects"] > 0
    student, _, teacher = found["models"]
    assert list(student["unstable"]) == ["encoder to 1", "1 to 2"]
    counts = list(student["queries_per_object"].values())
    assert counts == sorted(counts)
    assert counts[-1] == pytest.approx(12 * found["images"] / found["objects"])
    assert student["consistency"] == 100.0  # the teacher has the run's own weights
    assert student["unstable"] == teacher["unstable"]
    assert [step for step, _ in found["instability"]["average"]] == [4, 6]
    assert len(found["average_consistency"]) == 3
    page = (tmp_path / "run" / "diagnosis.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 2 * 3 * 2
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_matched_by_name(tiny: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny, run)
    detector, info = load_model(run)
    # The same model with its classes in another order under other names, and one more.
    names = info.classes.names
    order: list[int | None] = [None, *reversed(range(len(names)))]
    other = build_detector(info.detector.replace(num_classes=len(order)), pretrained=False)
    transfer(other, Source("start", info.detector, detector.state_dict()), columns=order)

    def save(rename: dict[str, str]) -> None:
        known = ["more", *(rename.get(name, name) for name in reversed(names))]
        classes = ClassMap(names=tuple(known), category_ids=tuple(range(len(known))))
        update = {"detector": other.config, "classes": classes}
        save_model(tmp_path / "other.safetensors", other, info.model_copy(update=update))

    command = ["diagnose", str(run), "--data", tiny.data.val or "", "--json"]
    asked = [*command, "--teacher", str(tmp_path / "other.safetensors")]
    save({})
    given = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert given.exit_code == 0, given.stderr
    student, teacher = json.loads(given.stdout)["models"]
    assert student["consistency"] == 100.0 and student["unstable"] == teacher["unstable"]

    save({names[0]: "otherwise"})
    refused = CliRunner().invoke(main, asked)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error[teacher-classes]") and names[0] in refused.stderr

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"teacher": str(run), "teacher_classes": {names[0]: "otherwise"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert given.exit_code == 0, given.stderr
    found = json.loads(given.stdout)
    assert found["models"][0]["consistency"] == 100.0

    baseline = [*command, "--baseline", str(tmp_path / "other.safetensors")]
    refused = CliRunner().invoke(main, baseline)
    assert refused.exit_code == 2 and refused.stderr.startswith("error[diagnose-classes]")


def test_a_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["diagnose", str(tmp_path), "--data", "kitti:x"])
    assert result.exit_code == 2 and result.stderr.startswith("error[run-missing]")
