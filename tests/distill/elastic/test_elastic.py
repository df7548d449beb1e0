"""Many models in one training: what a step trains, exact resume, and what is left afterwards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from safetensors.torch import load_file

from detr.errors import UserError
from detr.models import load_model
from detr.models.cli import model as model_command
from detr.models.share import within
from distill.cli import main
from distill.distributed import join
from distill.elastic.choices import Choice, ElasticRecipe, draws
from distill.elastic.step import at_depth, passes
from distill.evaluate import measure_ap
from distill.recipe import Recipe
from distill.training import loop
from distill.training.accumulate import Share
from distill.training.forward import losses_of
from distill.training.run_dir import RunDir
from distill.training.state import State, set_up

SMALL = (48, 96)


@pytest.fixture()
def elastic(tiny: Recipe, tmp_path: Path) -> Recipe:
    """A student of two encoder and two decoder layers that holds sixteen models."""
    content = tiny.model_dump(mode="json")
    teacher = tmp_path / "teacher"
    plain = {**content, "steps": 1, "ema": None, "detector": {**content["detector"]}}
    loop.train(Recipe.model_validate(plain), teacher)
    content["detector"]["encoder"]["layers"] = 2
    content |= {
        "teacher": str(teacher),
        "methods": [{"qskd": {"adaptor_layers": 0}}],
        "elastic": {
            "encoder_layers": [1, 2],
            "decoder_layers": [1, 2],
            "queries": [6, 12],
            "sizes": [list(SMALL), [64, 128]],
        },
        "steps": 4,
        "checkpoint_every": 2,
    }
    return Recipe.model_validate(content)


def opened(recipe: Recipe, folder: Path) -> State:
    return set_up(recipe, RunDir(folder, recipe), join())


def test_draws_follow_from_seed_and_step_and_hold_both_ends() -> None:
    choices = ElasticRecipe(decoder_layers=(1, 2, 3), queries=(6, 12))
    all_of_them = [Choice(2, d, q, None) for d in (1, 2, 3) for q in (6, 12)]
    assert len(choices.decoder_layers) * len(choices.queries) == len(all_of_them)
    seen: Counter[Choice] = Counter()
    sources: Counter[str] = Counter()
    for step in range(300):
        found = draws(all_of_them, 2, 7, step)
        assert found == draws(all_of_them, 2, 7, step)
        assert [d.role for d in found] == ["largest", "smallest", "drawn", "drawn"]
        assert (found[0].choice, found[1].choice) == (all_of_them[-1], all_of_them[0])
        assert found[0].source == "teacher" and len({d.choice for d in found}) == 4
        seen.update(d.choice for d in found[2:])
        sources.update(d.source for d in found[1:])
    assert set(seen) == set(all_of_them[1:-1]) and min(seen.values()) > 100
    assert abs(sources["teacher"] - sources["largest"]) < 150
    assert draws(all_of_them, 2, 8, 0) != draws(all_of_them, 2, 7, 0)
    assert len(draws(all_of_them, 99, 7, 0)) == len(all_of_them)
    assert [d.role for d in draws(all_of_them[:2], 1, 7, 0)] == ["largest", "smallest"]


def test_every_memory_has_a_deep_decoder_and_the_deepest_a_shallow_one_before_one_has_two() -> None:
    lists = ElasticRecipe(encoder_layers=(1, 2, 3), decoder_layers=(1, 2), queries=(6, 12))
    sizes = (SMALL, (64, 128))
    choices = [
        Choice(e, d, q, size)
        for e in lists.encoder_layers
        for d in lists.decoder_layers
        for q in lists.queries
        for size in sizes
    ]
    memories = {(e, size) for e in lists.encoder_layers for size in sizes}
    seen: Counter[tuple[int, object]] = Counter()
    for step in range(100):
        found = [draw.choice for draw in draws(choices, 5, 7, step)]
        deep = [x for x in found if x.decoder_layers == 2]
        assert {(x.encoder_layers, x.size) for x in deep} == memories and len(deep) == 6
        two = [draw.choice for draw in draws(choices, 2, 7, step) if draw.role == "drawn"]
        assert [x.decoder_layers for x in two] == [2, 2]
        assert len({(x.encoder_layers, x.size) for x in two} - {(3, (64, 128))}) == 2
        seen.update((x.encoder_layers, x.size) for x in two)
        # And the deepest memory has a shallow one before any has two.
        six = [draw.choice for draw in draws(choices, 6, 7, step)]
        corner = [
            x for x in six if (x.encoder_layers, x.size, x.decoder_layers) == (3, sizes[1], 1)
        ]
        assert len(corner) == 1
    assert len(seen) == 5 and min(seen.values()) > 20
    # Where decoders have one depth, the smallest model reads its memory already.
    one_depth = [Choice(e, 2, q, None) for e in (1, 2, 3) for q in (6, 12)]
    for step in range(20):
        (drawn,) = [x.choice for x in draws(one_depth, 1, 7, step) if x.role == "drawn"]
        assert drawn.encoder_layers == 2


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"decoder_layers": [1]}, "decoder_layers ends with 1, and the recipe's own is 2"),
        ({"queries": [12, 6]}, "is not ascending"),
        ({"sizes": [[48, 128], [64, 96]]}, "is not ascending"),
        ({"sizes": [[48, 96]]}, "sizes ends with"),
        ({}, "nothing to choose between"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tiny: Recipe, changes: Any, part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        Recipe.model_validate({**tiny.model_dump(mode="json"), "elastic": changes})


@pytest.mark.slow
def test_methods_of_both_teachers_teach_every_depth_of_the_encoder(
    elastic: Recipe, tmp_path: Path
) -> None:
    """OD-DETR compares decoders by number, so that all models must have the same."""
    both = elastic.replace(methods=({"od_detr": {}}, {"clockdistill": {}}), ema=0.9, steps=2)
    with pytest.raises(UserError, match=r"od_detr.*elastic: ") as error:
        opened(both, tmp_path / "decoders")
    assert error.value.code == "method-queries"
    depths = {"encoder_layers": (1, 2), "decoder_layers": (), "queries": (), "sizes": ()}
    state = opened(both.replace(elastic=depths), tmp_path / "encoders")
    for index in range(2):
        values = loop.train_step(state, state.batches.batch(index), index)
        assert values["loss"] > 0 and "smallest" in values


def test_an_encoder_that_joins_its_layers_has_one_depth(tiny: Recipe) -> None:
    content = tiny.model_dump(mode="json")
    content["detector"]["encoder"] |= {"layers": 2, "fusion": "simple"}
    with pytest.raises(ValidationError, match="fewer of them are no encoder"):
        Recipe.model_validate({**content, "elastic": {"encoder_layers": [1, 2]}})
    Recipe.model_validate({**content, "elastic": {"decoder_layers": [1, 2]}})


def test_models_share_one_encoding_and_say_what_they_say_alone(
    elastic: Recipe, tmp_path: Path
) -> None:
    state = opened(elastic.replace(**{"detector.dropout": 0.0}), tmp_path / "run")
    network = state.elastic
    assert network is not None and len(network.choices) == 16
    index = next(
        i
        for i in range(99)
        if {d.draw.source for d in network.trained(i)} == {"teacher", "largest"}
    )
    for model in network.trained(index):
        model.detector.backbone.eval()  # two looks at a batch change its statistics
    batch = state.batches.batch(index)
    assert set(batch.smaller) == {SMALL}
    answered, parts = [], {}
    for one in passes(state, network, batch, index):
        share = Share(*state.box_counts(one.batch.targets), *state.generators(index))
        found, losses = one.look(one.batch, share)
        assert all(torch.isfinite(value) for value in losses.values())
        answered += found
        parts |= losses if "largest" in losses else {}
    trained = sorted(network.trained(index), key=lambda model: model.draw.choice.size != (64, 128))
    # The largest counts one and a half times.
    own = losses_of(answered[0].step, answered[0].methods, elastic.loss)
    expected = 1.5 * torch.stack(list(own.values())).sum().item() / (len(trained) + 0.5)
    assert parts["largest"].item() == pytest.approx(expected, rel=1e-4)
    for model, one in zip(trained, answered, strict=True):
        choice, step = model.draw.choice, one.step
        assert step.images.shape[-2:] == choice.size
        assert len(step.student_outputs["own"].logits) == choice.decoder_layers
        assert step.student_outputs["own"].logits[-1].shape[1] == choice.queries
        with torch.no_grad():
            alone = model.detector.encode(step.images, step.valid_sizes)
        assert torch.allclose(alone.tokens, step.student_memory.tokens, atol=1e-5)
        assert len(alone.layers) == len(step.student_memory.layers)
        taught = state.teacher if model.draw.source == "teacher" else network.largest
        assert step.teacher is taught
        assert step.teacher_memory is not None and not step.teacher_memory.tokens.requires_grad


def test_the_memory_of_fewer_layers_is_that_of_their_encoder(
    elastic: Recipe, tmp_path: Path
) -> None:
    state = opened(elastic, tmp_path / "run")
    student = state.student.eval()
    batch = state.batches.batch(0)
    with torch.no_grad():
        memory = student.encode(batch.images, batch.valid_sizes)
        smaller = within(student, 1, 1, 6).encode(batch.images, batch.valid_sizes)
    cut = at_depth(memory, 1)
    assert torch.equal(cut.tokens, smaller.tokens) and len(cut.layers) == 2
    assert at_depth(memory, 2) is memory


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_an_unstopped_one(
    elastic: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    loop.train(elastic, straight)
    whole = loop.train_step

    def stopping(state: State, batch: Any, index: int) -> dict[str, float]:
        if index == 3:
            raise KeyboardInterrupt
        return whole(state, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            loop.train(elastic, stopped)
    loop.train(elastic, stopped)
    ours, theirs = (load_file(run / "model.safetensors") for run in (straight, stopped))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").open()]
    losses = next(row for row in rows if "largest" in row)
    parts = [losses[role] for role in ("largest", "smallest", "drawn")]
    assert losses["loss"] == pytest.approx(sum(parts), rel=1e-4)


@pytest.mark.slow
def test_parts_of_a_step_are_the_step(elastic: Recipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"detector.dropout": 0.0, "ema": None, "steps": 2}
    whole = elastic.replace(**changes, methods=({"qskd": {"features": False}},))
    found = []
    for parts in (1, 2):
        state = opened(whole.replace(accumulate=parts), tmp_path / f"run{parts}")
        assert state.elastic is not None
        for model in [m for i in range(2) for m in state.elastic.trained(i)]:
            model.detector.backbone.eval()  # batch norm sees one part at a time
        for index in range(2):
            loop.train_step(state, state.batches.batch(index), index)
        found.append(state.checkpoint(2)["optimizer"])
    # Of the gradients: where one is almost zero, Adam makes a whole step of how it was rounded.
    assert found[0].keys() == found[1].keys()
    for name, moments in found[0].items():
        mean, other = moments["exp_avg"], found[1][name]["exp_avg"]
        assert (mean - other).norm() <= 1e-4 * mean.norm() + 1e-9, name


def test_the_command_trains_and_every_choice_is_a_model(elastic: Recipe, tmp_path: Path) -> None:
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(elastic.to_yaml())
    arguments = [str(recipe), "--out", str(run), "--set", "steps=2"]
    result = CliRunner().invoke(main, ["elastic", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    cut = ["extract", str(run), "--encoder", "0", "--decoder", "0", "--queries", "6"]
    cut += ["--size", "48x96", "--out", str(tmp_path / "cut.safetensors")]
    assert CliRunner().invoke(model_command, cut, catch_exceptions=False).exit_code == 0
    detector, info = load_model(tmp_path / "cut.safetensors")
    assert info.preprocess.size == SMALL and detector.config.queries.number == 6
    assert info.provenance["extracted"]["queries"] == 6
    assert not any(key.startswith("ap") for key in info.provenance)
    state = opened(elastic.replace(steps=2), run)
    assert state.val is not None
    assert 0 <= measure_ap(detector, state.val, info.preprocess).boxes.ap <= 1
    whole, _ = load_model(run)
    view = within(whole, 1, 1, 6)
    images = torch.rand(1, 3, *SMALL)
    sizes = torch.tensor([[48.0, 96.0]])
    with torch.no_grad():
        for got, want in zip(
            detector(images, sizes, sizes), view(images, sizes, sizes), strict=True
        ):
            assert torch.equal(got, want)


def test_the_other_commands_send_here_and_back(
    tiny: Recipe, elastic: Recipe, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(elastic.to_yaml())
    result = CliRunner().invoke(main, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "error[recipe-elastic]" in result.stderr
    result = CliRunner().invoke(main, ["elastic", str(recipe), "--set", "elastic=null"])
    assert result.exit_code == 2 and "error[recipe-not-elastic]" in result.stderr
    result = CliRunner().invoke(main, ["elastic", str(recipe), "--set", "methods=[]"])
    assert result.exit_code == 2 and "error[recipe-not-distillation]" in result.stderr
    assert elastic.without_teacher().elastic is None


def test_a_method_that_does_not_fit_a_model_says_which(elastic: Recipe, tmp_path: Path) -> None:
    wrong = elastic.replace(methods=({"qskd": {"layer_map": [0, 1]}},))
    with pytest.raises(UserError, match="elastic: e1-d1") as caught:
        opened(wrong, tmp_path / "run")
    assert caught.value.code == "method-layer-map"


def test_what_methods_bring_along_is_shared_where_it_is_alike(
    elastic: Recipe, tmp_path: Path
) -> None:
    state = opened(elastic.replace(methods=({"fgd": {}},)), tmp_path / "run")
    assert state.elastic is not None
    groups = [group["params"] for group in state.optimizer.param_groups]
    moved = [id(parameter) for group in groups for parameter in group]
    assert len(moved) == len(set(moved))
    methods = state.elastic.methods
    tensors = {id(p) for method in methods for p in method.parameters()}
    single = {id(p) for p in methods[0].parameters()}
    assert single and len(tensors) == 2 * len(single)  # towards the teacher, and the largest
