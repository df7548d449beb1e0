"""``bench train-step``: the parts of a step add up, and each is what it is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.cli import main
from detr.config import DetectorConfig
from detr.errors import UserError
from distill.analysis.step_cost import step_costs, time_steps
from distill.losses.weights import LossWeights
from distill.profiler import Clock, span, timed
from distill.recipe import Recipe


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_parts_leave_out_the_parts_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(Clock, "_now", lambda self: now[0])

    @timed("matching")
    def taking_five() -> None:
        now[0] += 5

    clock = Clock(torch.device("cpu"))
    with clock, span("losses"):
        now[0] += 2
        taking_five()
        now[0] += 1
        taking_five()
    taking_five()  # nobody listens any more
    assert dict(clock.seconds) == {"losses": 3, "matching": 10}


@pytest.mark.slow
def test_every_method_is_split_into_its_parts(tiny: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())
    command = ["train-step", "--config", str(path), "--methods", "kd_detr,qskd+fitnet,od_detr"]
    command += ["--turns", "1", "--threads", "1", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)
    assert table["clock"] == "processor" and table["size"] == list(tiny.input.size)
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["none", "teacher", "kd_detr", "qskd+fitnet", "od_detr"]
    assert rows["none"]["added"] == 0 and rows["none"]["teacher"] == 0
    assert rows["teacher"]["added"] == 0 and rows["teacher"]["teacher"] > 0
    for name, row in rows.items():
        parts = ["student", "teacher", "extra_queries", "matching", "losses", "backward"]
        total = sum(row[part] for part in [*parts, "optimizer"])
        assert total == pytest.approx(row["total"], rel=1e-6), name
        assert row["matching"] > 0 and row["losses"] > 0
        assert name == "none" or row["teacher"] > 0


def test_a_recipe_gives_its_methods_their_options(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def note(name: str, specs: list[dict[str, object]], *_: object) -> None:
        seen[name] = specs
        if specs:
            raise UserError("seen", "enough")

    monkeypatch.setattr("distill.analysis.step_cost._state", note)
    qskd = {"qskd": {"adaptor_layers": 0}}
    recipe = tiny.model_copy(update={"teacher": "runs/teacher", "methods": (qskd,)})
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.to_yaml())
    command = ["train-step", "--config", str(path), "--methods", "qskd+fitnet"]
    assert "seen" in CliRunner().invoke(main, command).stderr
    assert seen == {"none": [], "teacher": [], "qskd+fitnet": [qskd, {"fitnet": {}}]}


def test_detectors_with_masks_are_timed(small_preset: Callable[..., DetectorConfig]) -> None:
    """Noise has masks, too, and as many points are looked at as the recipe says."""
    config = small_preset("mask-dino")
    options = {"qskd": {"mask_weight": 5.0, "threshold": -0.9}}
    loss = LossWeights(mask_points=16)
    rows = time_steps(config, config, ["qskd"], (64, 128), 1, 1, options, loss)
    assert [row.method for row in rows] == ["none", "teacher", "qskd"]
    assert all(row.losses > 0 for row in rows)


def test_of_all_methods_those_are_timed_that_the_detectors_run(
    small_preset: Callable[..., DetectorConfig],
) -> None:
    config = small_preset("dino")
    left_out: list[str] = []
    rows = time_steps(config, config, ["fitnet", "go_lsd"], (64, 128), 1, 1, left_out=left_out)
    assert [row.method for row in rows] == ["none", "teacher", "fitnet"]
    assert len(left_out) == 1 and "go_lsd" in left_out[0]
    with pytest.raises(UserError, match="go_lsd"):
        time_steps(config, config, ["go_lsd"], (64, 128), 1, 1)


def test_rows_by_hand() -> None:
    plain = {"student": 1.0, "student_decoder": 0.5, "matching": 0.1, "losses": 0.1, "backward": 2}
    taught = plain | {"teacher": 1.0, "teacher_decoder": 0.3}
    points = taught | {"student_decoder": 0.9, "teacher_decoder": 0.5, "queries": 0.1}
    costly = taught | {"matching": 0.4, "losses": 0.3}
    average = plain | {"teacher": 0.8, "teacher_decoder": 0.2, "losses": 0.2}
    found = {"none": plain, "teacher": taught, "kd_detr": points, "qskd": costly}
    found |= {"d3etr": costly, "fitnet": taught | {"losses": 0.55}, "od_detr": average}
    found |= {"stable_dino": plain | {"backward": 2.37}}
    rows = {row.method: row for row in step_costs({name: [x] * 3 for name, x in found.items()})}
    assert rows["kd_detr"].student == pytest.approx(1500)
    assert rows["kd_detr"].teacher == pytest.approx(1300)
    assert rows["kd_detr"].extra_queries == pytest.approx(700)  # 0.4 + 0.2 decoding, 0.1 making
    assert rows["kd_detr"].added == pytest.approx(0.7 / 5)
    assert rows["d3etr"].matching_and_losses == pytest.approx(0.7 / 5.5)
    assert rows["od_detr"].teacher == pytest.approx(1000)
    assert rows["od_detr"].extra_queries == pytest.approx(0)
    assert rows["od_detr"].added == pytest.approx(0.1 / 4.7)
    assert rows["stable_dino"].added == pytest.approx(0.1)
    dear = {name for name, row in rows.items() if not row.cheap}
    assert dear == {"qskd", "d3etr", "fitnet"}  # 12.7 %, 12.7 % and 11.9 %


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--config", "dino-r1"], "preset-unknown"),
        (["--config", "dino-r18", "--methods", "fitnes"], "method-unknown"),
        (["--config", "dino-r18", "--size", "800"], "option-form"),
    ],
)
def test_mistakes_are_told(options: list[str], code: str) -> None:
    result = CliRunner().invoke(main, ["train-step", *options])
    assert result.exit_code == 2 and result.stderr.startswith(f"error[{code}]")
