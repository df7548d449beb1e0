"""What an elastic run's models are worth beside the same ones distilled alone, and its cost.

    python -m tools.elastic models runs/elastic --data kitti:DATA:val --out elastic.json \
      --alone e1-d1-q40-72x240 --alone e2-d2-q40-96x320 --set optimizer.lr=5.0e-4
    python -m tools.elastic cost runs/elastic --rounds 3
    python -m tools.elastic choice runs/elastic/fit/fit.json report/report.json

``models`` measures every model of the run, and trains those named after ``--alone`` for as many
steps from the same first weights by the same recipe, in which ``--set`` may give them a rate of
their own; the same command again goes on. ``cost`` times steps of the elastic training and of the
largest model's own, in turns, in processor time.
``choice`` holds what ``distill fit`` kept against another measurement of the same bundles, by
``bench run``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.fit.model import Fit
from bench.report.model import PerformanceBudget, Report
from detr.data import open_dataset
from detr.files import write_atomic
from detr.models import load_model
from detr.models.extract import extract_layers
from distill.distributed import join
from distill.elastic.choices import Choice
from distill.elastic.fit import choices_of
from distill.evaluate import measure_ap
from distill.recipe import Recipe, load_recipe
from distill.training.loop import train, train_step
from distill.training.run_dir import RunDir
from distill.training.state import set_up
from tools.turns import in_turns

# Of a round.
STEPS = 4


def alone(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe of one model of an elastic run, from the same layers of the teacher."""
    changes: dict[str, Any] = {
        "name": choice.name,
        "elastic": None,
        "data.val": None,
        "detector.encoder": {"layers": choice.encoder_layers},
        "detector.decoder": {"layers": choice.decoder_layers},
        "detector.queries": {"number": choice.queries},
    }
    if choice.size is not None:
        changes["input"] = {"size": choice.size}
    if recipe.inherit is not None:
        first = {"encoder": choice.encoder_layers, "decoder": choice.decoder_layers}
        changes["inherit"] = {part: tuple(range(depth)) for part, depth in first.items()}
    return recipe.replace(**changes)


def models(run: Path, data: str, out: Path, names: list[str], changes: list[str]) -> None:
    """Writes the AP of every model of a run, and of those trained alone, under a changed recipe."""
    recipe = load_recipe(run / "recipe.yaml", changes)
    whole, info = load_model(run)
    val = open_dataset(data, info.classes, info.preprocess.range)

    def ap(model: Any, choice: Choice) -> float:
        size = info.preprocess if choice.size is None else info.preprocess.replace(size=choice.size)
        return 100 * measure_ap(model, val, size).boxes.ap

    found = json.loads(out.read_text()) if out.exists() else {"models": {}, "alone": {}}
    if found["alone"] and found["alone_set"] != changes:
        sys.exit(f"{out}: its models alone were trained with --set {found['alone_set']}")
    found |= {"run": str(run), "data": data, "images": len(val), "steps": recipe.steps}
    found["alone_set"] = changes
    chosen = {choice.name: choice for choice in choices_of(run)}

    def measure(place: str, name: str, model: Any) -> None:
        found[place][name] = ap(model, chosen[name])
        write_atomic(out, json.dumps(found, indent=2) + "\n")
        print(f"{name} ({place}): {found[place][name]:.1f}", flush=True)

    # Those that are compared first.
    for name in dict.fromkeys([*names, *chosen]):
        if name not in found["models"]:
            one = chosen[name]
            layers = range(one.encoder_layers), range(one.decoder_layers)
            measure("models", name, extract_layers(whole, *layers, one.queries))
        if name in names and name not in found["alone"]:
            folder = run / "alone" / name
            train(alone(recipe, chosen[name]), folder)
            measure("alone", name, load_model(folder)[0])


def cost(run: Path, rounds: int) -> None:
    """Prints the processor time of a step of both trainings, and their ratio."""
    recipe = load_recipe(run / "recipe.yaml").replace(**{"data.val": None})
    recipes = {"elastic": recipe, "single": alone(recipe, choices_of(run)[-1])}
    with tempfile.TemporaryDirectory() as scratch:
        states = {
            name: set_up(one, RunDir(Path(scratch) / name, one), join())
            for name, one in recipes.items()
        }
        done = dict.fromkeys(states, 0)

        def steps(name: str) -> None:
            # Several, since what an elastic step costs depends on what it draws.
            for index in range(done[name], done[name] + STEPS):
                train_step(states[name], states[name].batches.batch(index), index)
            done[name] += STEPS

        timed = in_turns({name: partial(steps, name) for name in states}, rounds)["processor"]
    for name, seconds in timed.items():
        print(f"{name}: {seconds.median / STEPS:.3f} s of processor time a step")
    ratio = timed["elastic"].median / timed["single"].median
    print(f"ratio {ratio:.2f}, {rounds} rounds of {STEPS} steps")


def choice(fit: Path, report: Path) -> None:
    """Prints what another measurement of all candidates would have kept, and how near its time is.

    Raises:
        SystemExit: With status 1 where the choice is another one or is no longer on the front.
    """
    kept = Fit.model_validate_json(fit.read_text())
    again = Report.model_validate_json(report.read_text())
    budget = PerformanceBudget(ms=kept.budget_ms)
    within = [row for row in again.rows if not budget.misses(row)]
    best = max(within, key=lambda row: (row.coco.ap, -row.latency.end_to_end.p90_ms), default=None)
    front = [row.model for row in again.pareto()]
    for row in again.rows:
        if row.model == kept.kept:
            p90 = row.latency.end_to_end.p90_ms
            print(f"kept {row.model}: p90 {p90:.2f} ms, {p90 / kept.budget_ms:.3f} of the budget")
    name = None if best is None else best.model
    print(f"best of {len(again.rows)} by the report: {name}; its front: {', '.join(front)}")
    sys.exit(0 if name is not None and name == kept.kept and name in front else 1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("models")
    first.add_argument("run", type=Path)
    first.add_argument("--data", required=True)
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--alone", action="append", default=[], metavar="NAME")
    first.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    second = verbs.add_parser("cost")
    second.add_argument("run", type=Path)
    second.add_argument("--rounds", type=int, default=3)
    third = verbs.add_parser("choice")
    third.add_argument("fit", type=Path)
    third.add_argument("report", type=Path)
    given = parser.parse_args()
    if given.verb == "models":
        if given.set and not given.alone:
            parser.error("--set is for the models after --alone")
        models(given.run, given.data, given.out, given.alone, given.set)
    elif given.verb == "cost":
        cost(given.run, given.rounds)
    else:
        choice(given.fit, given.report)


if __name__ == "__main__":
    main()
