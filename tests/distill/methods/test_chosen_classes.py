"""A teacher of 91 outputs teaches a student of 80 or 7 as one whose other outputs were cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.models import Detector
from distill.methods import METHODS, Method
from distill.methods.step import Step
from distill.teachers.chosen_classes import ChosenClasses

OUTPUTS = 91
# Which outputs the official checkpoints leave unused.
UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
USED = tuple(i for i in range(OUTPUTS) if i not in UNUSED)
READERS = [n for n, kind in METHODS.items() if kind.teacher == "frozen" and kind.reads_scores]
OPTIONS: dict[str, dict[str, Any]] = {
    "qskd": {"threshold": -0.9},
    "kd_detr": {"layers": "paired"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("columns", [USED, (90, 3, 1, 44, 2, 17, 8)], ids=["80", "7"])
def test_losses_are_those_of_a_teacher_cut_by_hand(
    name: str,
    columns: tuple[int, ...],
    query_kind: str,
    build: Callable[..., Detector],
    take_step: Callable[..., Step],
    method: Callable[..., Method],
) -> None:
    wide = build(1, query_kind, num_classes=OUTPUTS).eval()
    rest = torch.tensor([i for i in range(OUTPUTS) if i not in columns])
    with torch.no_grad():
        # No token proposes for the sake of a class that is cut off.
        wide.source.proposals.class_head.weight[rest] = 0
        wide.source.proposals.class_head.bias[rest] = -50
    cut = build(2, query_kind, num_classes=len(columns)).eval()
    rows = torch.tensor(columns)
    tensors = {
        key: x[rows] if "class_head" in key or "label_embedding" in key else x
        for key, x in wide.state_dict().items()
    }
    cut.load_state_dict(tensors)
    chosen = ChosenClasses(wide, columns, 100).eval()

    def losses(teacher: Any) -> dict[str, torch.Tensor]:
        student = build(3, query_kind, num_classes=len(columns)).train()
        torch.manual_seed(4)
        tested = method(name, student, teacher, **OPTIONS.get(name, {}))
        step = take_step(student, teacher, [tested])
        return (tested.detection_losses(step) or {}) | tested.losses(step)

    found, wanted = losses(chosen), losses(cut)
    assert found.keys() == wanted.keys() and any(x > 0 for x in wanted.values())
    for key, value in wanted.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-6, abs=1e-6), key


def test_left_out_classes_are_no_object_under_a_softmax(build: Callable[..., Detector]) -> None:
    wide = build(1, "learned", num_classes=5, heads={"classes": {"kind": "softmax"}}).eval()
    chosen = ChosenClasses(wide, (4, 0), 100).eval()
    memory = chosen.encode(torch.randn(2, 3, 64, 96), torch.full((2, 2), 64.0))
    groups = chosen.queries(memory)
    (found,), (said,) = chosen.decode(memory, groups), wide.decode(memory, groups)
    for ours, theirs in zip(found.logits, said.logits, strict=True):
        scores, all_scores = ours.softmax(-1), theirs.softmax(-1)
        torch.testing.assert_close(scores[..., :2], all_scores[..., [4, 0]])
        torch.testing.assert_close(scores[..., 2], all_scores[..., [1, 2, 3, 5]].sum(-1))
