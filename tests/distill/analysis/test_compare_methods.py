"""Comparisons: what a cell is, what a failure costs, what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from detr.errors import UserError
from distill.analysis.cells import Runner, in_sequence
from distill.analysis.compare_methods import Cell, MethodComparison, cell_recipe, compare_methods
from distill.cli import main
from distill.recipe import Recipe, load_recipe


def distilling(tiny: Recipe, **changes: object) -> Recipe:
    settings = {"teacher": "runs/teacher", "methods": [{"clockdistill": {"copies": 2}}]}
    return Recipe.model_validate({**tiny.model_dump(), **settings, **changes})


def test_cells_differ_in_method_and_seed_only(tiny: Recipe) -> None:
    recipe = distilling(tiny)
    base, clock = cell_recipe(recipe, "baseline", 3), cell_recipe(recipe, "clockdistill", 3)
    assert base.teacher is None and base.methods == () and base.seed == clock.seed == 3
    assert clock.methods == ({"clockdistill": {"copies": 2}},) and clock.teacher == "runs/teacher"
    both = cell_recipe(recipe, "d3etr+mgd", 0)
    assert both.methods == ({"d3etr": {}}, {"mgd": {}})
    same = {"name", "seed", "methods", "teacher"}
    assert base.model_dump(exclude=same) == both.model_dump(exclude=same)


def test_a_row_that_only_inherits_stands_beside_methods_that_do(
    tiny: Recipe, tmp_path: Path
) -> None:
    recipe = distilling(tiny, inherit=True)
    only = cell_recipe(recipe, "inherit", 1)
    assert only.methods == () and only.inherit == recipe.inherit and only.teacher == recipe.teacher
    table = compare_methods(
        recipe, ["fitnet", "inherit"], 1, tmp_path / "with", run=in_sequence(fake)
    )
    assert [cell.method for cell in table.cells] == ["baseline", "inherit", "fitnet"]
    table = compare_methods(
        distilling(tiny), ["fitnet"], 1, tmp_path / "without", run=in_sequence(fake)
    )
    assert [cell.method for cell in table.cells] == ["baseline", "fitnet"]


def test_an_average_that_is_measured_keeps_following(tiny: Recipe) -> None:
    recipe = distilling(tiny)
    assert cell_recipe(recipe, "od_detr", 0).methods == ({"od_detr": {"stop_update": False}},)
    only = distilling(tiny, ema_evaluated=False)
    assert cell_recipe(only, "od_detr", 0).methods == ({"od_detr": {}},)
    none = cell_recipe(distilling(tiny, ema=None), "od_detr", 0)
    assert none.ema == 0.9996 and not none.ema_rising and not none.ema_evaluated


def test_mistakes_are_told_before_anything_runs(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        compare_methods(
            distilling(tiny), ["clockdistil"], 1, tmp_path / "out", run=in_sequence(lambda *_: None)
        )
    assert caught.value.code == "method-unknown" and not (tmp_path / "out").exists()
    with pytest.raises(UserError) as caught:
        cell_recipe(tiny, "fitnet", 0)
    assert caught.value.code == "recipe-value" and "teacher" in caught.value.message


def fake(path: Path, out: Path) -> str | None:
    recipe = load_recipe(path)
    if recipe.methods and "fgd" in recipe.methods[0]:
        return "error[loss-not-finite]: step 3"
    out.mkdir(parents=True, exist_ok=True)
    ap = 0.2 + 0.1 * recipe.seed + (0.05 if recipe.methods else 0)
    rows = [{"step": 2, "ms": 900}, {"step": 4, "ms": 500}, {"step": 4, "ap": ap, "ap50": 0.5}]
    rows.append({"step": 4, "peak_mb": 100})
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return None


def test_one_table_of_all_cells_and_a_failure_costs_only_itself(
    tiny: Recipe, tmp_path: Path
) -> None:
    table = compare_methods(
        distilling(tiny), ["clockdistill", "fgd"], 2, tmp_path, run=in_sequence(fake)
    )
    assert [(c.method, c.seed) for c in table.cells] == [
        (m, s) for m in ("baseline", "clockdistill", "fgd") for s in (0, 1)
    ]
    rows = table.to_markdown().splitlines()[4:7]
    # Baseline AP 20 and 30, with the method 25 and 35.
    assert rows[0].startswith("| baseline | 25.0 ± 7.1 | 50.0 ± 0.0 | - |")
    assert rows[0].endswith("| 0.500 ± 0.000 | 100 ± 0 | 2/2 |")
    assert rows[1].startswith("| clockdistill | 30.0 ± 7.1 |")
    assert rows[2] == "| fgd | - | - | - | - | - | - | - | - | 0/2 |"
    assert "loss-not-finite" in table.to_markdown()
    stored = MethodComparison.model_validate_json((tmp_path / "compare.json").read_text())
    assert stored == table
    assert (tmp_path / "compare.md").read_text() == table.to_markdown()
    page = (tmp_path / "compare.html").read_text()
    assert "<td>30.0 ± 7.1</td>" in page and "loss-not-finite" in page and "http" not in page


def test_masks_have_columns_where_there_are_any() -> None:
    plain = Cell(method="baseline", seed=0, values={"ap": 0.25})
    masked = Cell(method="qskd", seed=0, values={"ap": 0.5, "mask_ap": 0.4, "mask_ap50": 0.75})

    def table(*cells: Cell) -> list[str]:
        found = MethodComparison(recipe="r", data="d", steps=1, cells=list(cells))
        assert ("<th>mask AP</th>" in found.to_html()) == (masked in cells)
        return found.to_markdown().splitlines()[2:]

    head, _, row = table(plain)
    assert "mask" not in head and head.count("|") == row.count("|")
    head, _, first, second = table(plain, masked)
    assert "| L | mask AP | mask AP50 | mask AP75 | s/step |" in head
    assert first.startswith("| baseline | 25.0 | - | - | - | - | - | - | - | - |")
    assert second.startswith("| qskd | 50.0 | - | - | - | - | - | 40.0 | 75.0 | - |")


def test_names_are_escaped() -> None:
    cell = Cell(method="a", seed=0, error="<script>")
    page = MethodComparison(recipe="r", data="<b>", steps=1, cells=[cell]).to_html()
    assert "<script>" not in page and "<b>" not in page


@pytest.mark.slow
def test_a_comparison_through_the_command_line_goes_on(tiny: Recipe, tmp_path: Path) -> None:
    """A method without a teacher, really trained, in processes of their own; then once more."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())
    out = tmp_path / "compare"
    call = ["compare", str(path), "--methods", "stable_dino", "--out", str(out), "--json"]
    call += ["--set", "steps=2", "--set", "batch_size=1"]
    table = json.loads(CliRunner().invoke(main, call).stdout)
    assert [c["method"] for c in table["cells"]] == ["baseline", "stable_dino"]
    assert all(c["error"] is None and "ap" in c["values"] for c in table["cells"])
    assert all(c["seconds"] > 0 and c["megabytes"] > 50 for c in table["cells"])
    model = out / "cells" / "stable_dino-seed0" / "model.safetensors"
    before = model.stat().st_mtime_ns
    again = json.loads(CliRunner().invoke(main, call).stdout)
    assert again == table and model.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (["--methods", "stable_dino", "--data", "kitti:nowhere"], "data-missing"),
        (["--methods", ","], "usage"),
    ],
)
def test_what_would_fail_every_run_is_told_before_the_first(
    tiny: Recipe, tmp_path: Path, change: list[str], code: str
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())
    run = CliRunner().invoke(main, ["compare", str(path), *change, "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and run.stderr.startswith(f"error[{code}]")
    assert not (tmp_path / "out").exists()


def test_a_comparison_with_failed_runs_is_no_success(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.to_yaml())

    def comparison(
        recipe: Recipe, methods: list[str], seeds: int, out: Path, _: Runner
    ) -> MethodComparison:
        return compare_methods(
            distilling(recipe), [*methods, "fgd"], seeds, out, run=in_sequence(fake)
        )

    monkeypatch.setattr("distill.analysis.compare_methods.compare_methods", comparison)
    run = CliRunner().invoke(
        main, ["compare", str(path), "--methods", "mgd", "--out", str(tmp_path / "out")]
    )
    assert run.exit_code == 2 and "| mgd |" in run.stdout and "loss-not-finite" in run.stdout
    assert "error[compare-failed]" in run.stderr and "1 of 3 runs failed" in run.stderr


def test_curves_where_runs_are_measured_on_their_way(tiny: Recipe, tmp_path: Path) -> None:
    def measured(path: Path, out: Path) -> str | None:
        out.mkdir(parents=True)
        best = 0.4 if load_recipe(path).methods else 0.2
        rows = [{"step": 10 * i, "ap": best * i / 4, "ap50": 0.5} for i in (1, 2, 4)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return None

    table = compare_methods(distilling(tiny), ["fitnet"], 2, tmp_path, run=in_sequence(measured))
    assert table.cells[-1].curve == [(10, 0.1), (20, 0.2), (40, 0.4)]
    root = ElementTree.parse(tmp_path / "compare.svg").getroot()
    lines = [x.attrib["points"].split() for x in root.iter() if x.tag.endswith("polyline")]
    assert len(lines) == 4 and all(len(line) == 3 for line in lines)
    # Up is better, and the second AP of the method is the last one of the baseline.
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert heights[2] == sorted(heights[2], reverse=True) and heights[2][1] == heights[0][2]
    assert "<polyline" in (tmp_path / "compare.html").read_text()


def test_no_picture_of_runs_measured_once(tiny: Recipe, tmp_path: Path) -> None:
    table = compare_methods(distilling(tiny), ["fitnet"], 1, tmp_path, run=in_sequence(fake))
    assert table.to_svg() is None
    assert not (tmp_path / "compare.svg").exists()
