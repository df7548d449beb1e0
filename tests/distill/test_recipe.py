"""Recipes: every mistake is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.config import DetectorConfig, TwoStageQueriesConfig
from detr.errors import UserError
from detr.presets import FAMILIES, preset
from detr.upgrade import MOVED
from distill.recipe import Recipe, find_recipe, load_recipe, shipped

MINIMAL = """\
name: small
data: {train: "kitti:data:train"}
input: {size: [64, 128]}
detector:
  queries: {number: 10}
  backbone:
    name: resnet18
optimizer:
  lr: 0.001
steps: 5
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_valid_and_name_themselves(name: str) -> None:
    assert load_recipe(find_recipe(name)).name == name


@pytest.mark.parametrize(
    ("old", "new", "code", "told"),
    [
        ("steps: 5", "stepz: 5", "recipe-key", "recipe.yaml:10: no such key 'stepz'; did you mean"),
        ("  lr: 0.001", "  lr_: 1", "recipe-key", "yaml:9: no such key 'optimizer.lr_'; did you m"),
        ("    name:", "    nam:", "recipe-key", "yaml:7: no such key 'detector.backbone.nam'; did"),
        ("steps: 5", "steps: many", "recipe-value", "recipe.yaml:10: steps: "),
        ("steps: 5", "", "recipe-value", "recipe.yaml:1: steps: Field required"),
        ("steps: 5", "steps: 5\nsteps: 6", "recipe-key", "yaml:11: key 'steps' appears twice"),
        ("steps: 5", "steps: [5", "recipe-yaml", "recipe.yaml:11: "),
        ("steps: 5", "steps: 5\ninherit: true", "recipe-value", "need a teacher"),
        ("steps: 5", "steps: 5\nmethods: [clockdistill]", "recipe-value", "need a teacher"),
        (
            "  backbone:",
            "  attention_heads: 7\n  backbone:",
            "recipe-value",
            "yaml:4: detector: width",
        ),
    ],
)
def test_mistakes_name_file_and_line(
    tmp_path: Path, old: str, new: str, code: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, MINIMAL.replace(old, new)))
    assert caught.value.code == code
    assert told in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("detector", "code", "told"),
    [
        ("preset: dinor18", "recipe-value", "5: detector.preset: no detector is called 'dinor18'"),
        ("presets: dino-r18", "recipe-key", "5: no such key 'detector.presets'; did you mean 'pre"),
        (
            "preset: dino-r18\n  encodr: {}",
            "recipe-key",
            "6: no such key 'detector.encodr'; did",
        ),
        (
            "preset: dino-r18\n  queries:\n    numbr: 5",
            "recipe-key",
            "7: no such key 'detector.queries.numbr'; did you mean 'number'?",
        ),
        (
            "preset: dino-r18\n  queries:\n    kind: learned\n    denoising: {number: 3}",
            "recipe-key",
            "8: no such key 'detector.queries.denoising'; kind: learned has none, anchors,",
        ),
        (
            "preset: dino-r18\n  decoder:\n    cross_attention: {kind: deformble}",
            "recipe-value",
            "7: detector.decoder.cross_attention.kind: no such kind 'deformble'; did you mean def",
        ),
        (
            "preset: dino-r18\n  queries:\n    denoising: {number: 0}",
            "recipe-value",
            "7: detector.queries.denoising.number: Input should be greater",
        ),
        ("preset: dino-r18\n  neck: 4", "recipe-value", "6: detector.neck: expected a mapping"),
        ("preset: detr-r18\n  neck: {levels: 4}", "recipe-value", "4: detector: encoder: dense wo"),
        (
            "preset: detr-r18\nloss: {scores: varifocal}",
            "recipe-value",
            "6: loss.scores: varifocal is for heads.classes: sigmoid",
        ),
        (
            "preset: rtdetr-r18\nloss: {edges: 0.15}",
            "recipe-value",
            "6: loss.edges: is for decoder.refinement: distribution",
        ),
        (
            "preset: dino-r18\nloss: {dice: 2}",
            "recipe-value",
            "6: loss.dice: is for a detector with heads.masks",
        ),
    ],
)
def test_mistakes_in_parts_name_the_key_that_was_typed(
    tmp_path: Path, detector: str, code: str, told: str
) -> None:
    text = MINIMAL.replace(
        "  queries: {number: 10}\n  backbone:\n    name: resnet18", "  " + detector
    )
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.code == code
    assert f"recipe.yaml:{told}" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("key", MOVED)
def test_keys_of_the_first_release_are_told_where_they_went(tmp_path: Path, key: str) -> None:
    now = " and ".join(f"detector.{place}" for place in MOVED[key])
    without = MINIMAL.replace("  queries: {number: 10}\n", "")
    typed = without.replace("  backbone:", f"  {key}: 3\n  backbone:")
    for text, changes in ((typed, []), (without, [f"detector.{key}=3"])):
        with pytest.raises(UserError) as caught:
            load_recipe(write(tmp_path, text), changes)
        assert caught.value.code == "recipe-key"
        assert f": detector.{key} is now {now}" in caught.value.message
    for place in MOVED[key]:
        found: list[object] = list(FAMILIES.values())
        for part in place.split("."):
            found = [getattr(one, part) for one in found if hasattr(one, part)]
        assert found, f"no detector has {place}"


def test_a_preset_is_changed_key_by_key(tmp_path: Path) -> None:
    text = MINIMAL.replace("detector:\n", "detector:\n  preset: dino-r18\n  encoder: {layers: 3}\n")
    recipe = load_recipe(write(tmp_path, text), ["detector.decoder.layers=2"])
    wanted = preset("dino-r18", 7).replace(
        **{"encoder.layers": 3, "decoder.layers": 2, "queries.number": 10}
    )
    assert recipe.detector.for_classes(7) == wanted
    # Another kind has its own options, none of the preset's.
    recipe = load_recipe(
        write(tmp_path, text), ["detector.queries.kind=two_stage", "detector.queries.number=5"]
    )
    assert recipe.detector.queries == TwoStageQueriesConfig(number=5)
    # Without a preset, what the config says by default is changed.
    assert load_recipe(write(tmp_path, MINIMAL)).detector.for_classes(7) == DetectorConfig(
        num_classes=7
    ).replace(**{"queries.number": 10, "backbone.name": "resnet18"})


def test_off_is_a_word_and_true_is_not(tmp_path: Path) -> None:
    text = MINIMAL + "amp: off\nteacher: t\ninherit: true\nmethods: [{qskd: {predictions: off}}]\n"
    recipe = load_recipe(
        write(tmp_path, text), ["methods.0.qskd.features=False", "tensorboard=true"]
    )
    assert recipe.amp == "off" and recipe.inherit is not None and recipe.tensorboard is True
    assert recipe.methods == ({"qskd": {"predictions": "off", "features": False}},)
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe


def test_overrides_reach_nested_keys_and_lists(tmp_path: Path) -> None:
    text = MINIMAL + "teacher: t\nmethods:\n  - clockdistill: {alpha: 1.0}\n"
    recipe = load_recipe(
        write(tmp_path, text),
        ["optimizer.lr=2e-1", "validation.every=7", "methods.0.clockdistill.alpha=3.0", "ema=null"],
    )
    assert recipe.optimizer.lr == 0.2
    assert recipe.validation.every == 7
    assert recipe.methods == ({"clockdistill": {"alpha": 3.0}},)
    assert recipe.ema is None
    bare = write(tmp_path, MINIMAL + "teacher: t\nmethods: [clockdistill]\n")
    recipe = load_recipe(bare, ["methods.0.clockdistill.alpha=3.0"])
    assert recipe.methods == ({"clockdistill": {"alpha": 3.0}},)


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("optimizer.rl=1", "recipe-key"),
        ("steps=-1", "recipe-value"),
        ("methods.3.x=1", "recipe-key"),
        ("steps", "option-form"),
        ("steps={", "recipe-yaml"),
    ],
)
def test_mistakes_in_overrides_name_the_override(tmp_path: Path, override: str, code: str) -> None:
    text = MINIMAL + "teacher: t\nmethods: [clockdistill]\n"
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, text), [override])
    assert caught.value.code == code
    assert override in caught.value.message


def test_frozen_copy_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe


def test_classes_come_from_the_data(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.detector.for_classes(7).num_classes == 7
    named = Recipe.model_validate(
        {**recipe.model_dump(), "detector": {**recipe.detector.model_dump(), "num_classes": 3}}
    )
    with pytest.raises(UserError, match="7 classes"):
        named.detector.for_classes(7)


def test_unknown_recipe_suggests_a_shipped_one() -> None:
    with pytest.raises(UserError, match="did you mean demo-teacher"):
        find_recipe("demo-techer")


@pytest.mark.parametrize(
    ("override", "code", "told"),
    [
        ("methods=[{qskd: 3}]", "recipe-value", "methods.0.qskd: expected a mapping"),
        ("methods=[3]", "recipe-value", "methods.0: expected a mapping"),
        ("methods=qskd", "recipe-value", "methods: expected a list"),
        ("methods=[{qskd: {}, mgd: {}}]", "recipe-value", "methods: each entry is one name"),
        ("methods=[{qskd: {nix: 1}}]", "method-option", "methods.qskd.nix: no such option"),
        ("methods=[fgd, nix]", "method-unknown", "methods: no method 'nix'"),
        ("methods=[fgd, fgd]", "method-twice", "methods: fgd is listed twice"),
        ("elastic={decoder_layers: [1, 2]}", "recipe-value", "elastic.decoder_layers ends with 2"),
    ],
)
def test_a_list_put_in_place_is_told_by_its_override(override: str, code: str, told: str) -> None:
    """And not by a line of the file that has another list there."""
    with pytest.raises(UserError) as caught:
        load_recipe(find_recipe("demo-student"), (override,), methods=True)
    assert caught.value.code == code
    assert caught.value.message.startswith(f"--set {override}: {told}")


def test_methods_are_told_by_their_line(tmp_path: Path) -> None:
    path = write(
        tmp_path, "base: demo-student\nname: x\nmethods:\n  - fgd: {}\n  - mgd: {nix: 1}\n"
    )
    assert load_recipe(path).name == "x"
    with pytest.raises(UserError, match=r"recipe.yaml:5: methods.mgd.nix: no such option"):
        load_recipe(path, methods=True)
    path.write_text("base: demo-student\nname: x\nteacher: null\n")
    with pytest.raises(UserError, match=r"demo-student.yaml:\d+: methods and inherit need"):
        load_recipe(path)
