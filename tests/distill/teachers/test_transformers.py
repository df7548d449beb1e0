"""Detectors of the transformers library teach what they can, and methods say what they cannot."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from detr.config import ClassMap, Strict
from detr.data import open_dataset
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import Detector, TeacherPart
from distill.distributed import join
from distill.methods import METHODS, Method
from distill.methods.step import PairedGroup, Step
from distill.recipe import Recipe
from distill.teachers.chosen_classes import ChosenClasses, columns_of
from distill.teachers.open import open_teacher, tell_ap
from distill.teachers.transformers import FAMILIES, HuggingFaceTeacher, load
from distill.training.loop import train_step
from distill.training.run_dir import RunDir
from distill.training.state import set_up

sys.path.insert(0, str(Path(__file__).parent))
import hugging_face_models as models

KITTI = ClassMap(names=("Car", "Pedestrian", "Cyclist"), category_ids=(1, 2, 3))
INPUT = PreprocessConfig(size=(64, 128))
# What each family is asked to teach: between them, every method that such a teacher can serve.
LESSONS: dict[str, list[dict[str, Any]]] = {
    "rt_detr": [{"detrdistill": {"on": "memory"}}],
    "rt_detr_v2": [{"clockdistill": {"target_aware": False, "general": False}}],
    "d_fine": [{"kd_detr": {"general": False}}],
    "deimv2": [{"d3etr": {"self_attention": False, "cross_attention": False}}],
    "rf_detr": [{"fitnet": {}}, {"mgd": {}}],
    "lw_detr": [{"fgd": {}}, {"defeat": {}}],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {kind: models.write(kind, root / kind) for kind in models.CONFIGS}


def lesson(tiny: Recipe, folder: Path, methods: Any, **changes: Any) -> Recipe:
    settings = {**tiny.model_dump(), "teacher": f"hf:{folder}", "methods": methods, **changes}
    return Recipe.model_validate(settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.CONFIGS)
def test_each_family_teaches(kind: str, folders: Any, tiny: Recipe, tmp_path: Path) -> None:
    recipe = lesson(tiny, folders[kind], LESSONS[kind])
    state = set_up(recipe, RunDir(tmp_path / "run", recipe), join())
    assert isinstance(state.teacher, ChosenClasses)
    assert isinstance(state.teacher.teacher, HuggingFaceTeacher)
    before = copy.deepcopy(state.teacher.state_dict())
    for index in range(2):
        values = train_step(state, state.batches.batch(index), index)
        for entry in LESSONS[kind]:
            (name,) = entry
            learned = [v for key, v in values.items() if key.startswith(f"{name}/")]
            assert learned and all(map(math.isfinite, learned)) and sum(learned) > 0
    assert not state.teacher.training
    for name, tensor in state.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "missing"),
    [
        (["kd_detr"], "decode"),
        (["clockdistill"], "decode"),
        (["qskd"], "attention, backbone, decode, neck"),
        ([{"detrdistill": {"on": "neck"}}], "neck"),
        (["d3etr"], "attention"),
        ([{"fitnet": {"on": "backbone"}}], "backbone"),
        ([{"detrdistill": {"on": "memory", "mask_weight": 5}}], "masks"),
    ],
)
def test_what_it_cannot_teach_is_refused(
    methods: Any, missing: str, folders: Any, tiny: Recipe, tmp_path: Path
) -> None:
    recipe = lesson(tiny, folders["lw_detr"], methods)
    with pytest.raises(UserError, match=f"needs the teacher's {missing}; a LW-DETR") as error:
        set_up(recipe, RunDir(tmp_path / "run", recipe), join())
    assert error.value.code == "method-teacher"
    assert "\n" not in error.value.message


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.CONFIGS)
def test_its_facts_are_those_of_the_network(kind: str, folders: Any) -> None:
    teacher = load(folders[kind], INPUT)
    assert not isinstance(teacher, Detector) and not hasattr(teacher, "config")
    memory = teacher.encode(torch.zeros(1, 3, *INPUT.size), torch.tensor([[64.0, 128.0]]))
    groups = teacher.queries(memory)
    assert [group.role for group in groups] == ["own"]
    (answer,) = teacher.decode(memory, groups)
    facts, published = teacher.facts, teacher.model.config
    assert facts.family == FAMILIES[kind]
    assert facts.num_classes == answer.logits[0].shape[-1] == len(models.NAMES)
    assert facts.num_queries == answer.boxes[0].shape[1] == published.num_queries
    assert facts.width == memory.tokens.shape[-1] == published.d_model
    assert facts.decoder_layers == len(answer.logits) == len(answer.boxes)
    assert facts.encoder_layers == (1 if hasattr(published, "encoder_layers") else 0)
    assert memory.shapes == tuple((math.ceil(64 / s), math.ceil(128 / s)) for s in facts.strides)
    # What is not offered is empty.
    assert "backbone" not in teacher.offers and not facts.backbone_strides and not memory.features
    assert "neck" not in teacher.offers and not memory.layers
    assert "attention" not in teacher.offers and facts.heads == 0 and not answer.attention


class Asking(Method[Strict]):
    """Asks the teacher queries of its own, and says that it does not."""

    name = "asking"

    @classmethod
    def needs(cls, options: Strict) -> frozenset[TeacherPart]:
        return frozenset({"predictions"})

    def groups(self, step: Step) -> list[PairedGroup]:
        return [PairedGroup("asking/x", None, replace(step.teacher_groups[0], role="asking/x"))]

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        return {}


def test_a_method_that_hides_what_it_asks_is_stopped(
    folders: Any, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "asking", Asking)
    recipe = lesson(tiny, folders["lw_detr"], ["asking"])
    state = set_up(recipe, RunDir(tmp_path / "run", recipe), join())
    with pytest.raises(UserError, match=r"asking/x: a LW-DETR .* needs\(\) must") as error:
        train_step(state, state.batches.batch(0), 0)
    assert error.value.code == "method-teacher"


@pytest.mark.parametrize("kind", ["rt_detr", "lw_detr"])
def test_it_sees_its_own_kind_of_image(kind: str, folders: Any) -> None:
    teacher = load(folders[kind], INPUT)
    pixels = torch.rand(1, 3, *models.SIZE, generator=torch.Generator().manual_seed(0))
    told = json.loads((folders[kind] / "preprocessor_config.json").read_text())
    wanted = pixels
    if told["do_normalize"]:
        mean, std = (torch.tensor(told[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
        wanted = (pixels - mean) / std
    ours = torch.zeros(1, 3, *INPUT.size)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (INPUT.mean, INPUT.std))
    # Padded at the right: what is outside the image must not matter.
    ours[..., : models.SIZE[1]] = (255 * pixels - mean) / std
    ours[..., models.SIZE[1] :] = 7
    sizes = torch.tensor([models.SIZE], dtype=torch.float32)
    memory = teacher.encode(ours, sizes)
    answer = teacher.decode(memory, teacher.queries(memory))[0]
    with torch.no_grad():
        said = teacher.model(pixel_values=wanted)
    torch.testing.assert_close(answer.logits[-1], said.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(answer.boxes[-1], said.pred_boxes, atol=1e-4, rtol=0)
    boxes, _, labels = teacher(ours, sizes, 10 * sizes)
    assert boxes.max() > 10 and labels.max() < len(models.NAMES)


def test_its_maps_lie_on_the_students_canvas(folders: Any) -> None:
    teacher = load(folders["rt_detr"], INPUT)
    images, sizes = torch.zeros(2, 3, 64, 128), torch.tensor([[64.0, 128.0], [40.0, 72.0]])
    answer, _ = teacher._ask(torch.zeros(2, 3, *models.SIZE))
    ramp = (torch.arange(64) + 0.5) / 64  # what a map reads that tells where in the image it is
    maps = [ramp.expand(2, 1, 64, 64)] * 3
    teacher._ask = lambda pictures: (answer, maps)  # type: ignore[method-assign]
    memory = teacher.encode(images, sizes)
    assert memory.shapes == ((8, 16), (4, 8), (2, 4))
    first = memory.tokens[:, : 8 * 16, 0].view(2, 8, 16)
    torch.testing.assert_close(first[0, 3], (torch.arange(16) + 0.5) / 16)
    torch.testing.assert_close(first[1, 3, :9], (torch.arange(9) + 0.5) / 9)
    assert memory.padding.view(2, -1)[1, 9] and not memory.padding[1, 8]


def test_classes_are_matched_by_name(folders: Any, tiny: Recipe, tmp_path: Path) -> None:
    teacher = load(folders["lw_detr"], INPUT)
    assert teacher.class_names[: len(models.NAMES)] == models.NAMES
    known, place = teacher.class_names, "hf:folder"
    assert columns_of(place, known, ("car", "Van"), {"car": "Car"}) == (1, 4)
    with pytest.raises(UserError, match="does not know car; it knows tree, Car,") as error:
        columns_of(place, known, ("car", "Van"), {})
    assert error.value.code == "teacher-classes"
    with pytest.raises(UserError, match="teacher_classes: the data has no bus") as error:
        columns_of(place, known, ("Car", "Van"), {"bus": "Van"})
    assert error.value.code == "teacher-classes"
    # The key is the output's number, wherever counting starts.
    labels = {str(i): name for i, name in enumerate(models.NAMES) if i != 2}
    holes = changed(folders["lw_detr"], tmp_path, "config.json", id2label=labels | {"7": "Tram"})
    names = load(holes, INPUT).class_names
    assert names[2] == "" and names[4] == "Van"
    for labels, words in (
        ({"0": "Car", "Van": 1}, "key 'Van' is not the number"),
        ({"0": "Car", "1": "Van", "900": "bus"}, "names class 900"),
    ):
        with pytest.raises(UserError, match=words) as error:
            load(changed(folders["lw_detr"], tmp_path, "config.json", id2label=labels), INPUT)
        assert error.value.code in ("teacher-classes", "teacher-unreadable")


def test_it_is_measured_like_any_teacher(folders: Any, tiny: Recipe) -> None:
    data = open_dataset(tiny.data.train)
    recipe = lesson(tiny, folders["lw_detr"], ["fitnet"], min_teacher_ap=0.9)
    opened = open_teacher(recipe, data.classes, torch.device("cpu"))
    assert opened.detector is None
    val = open_dataset(str(tiny.data.val), data.classes)
    with pytest.raises(UserError, match=r"at least 0\.900") as error:
        tell_ap(recipe, opened, val, print)
    assert error.value.code == "teacher-weak"


def changed(folder: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    """A copy of a folder with another JSON file."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / name).read_text()) | changes
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes", "code", "words"),
    [
        ("config.json", {"model_type": "yolos"}, "teacher-family", "'yolos' is none of rt_detr"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 800}},
            "teacher-input",
            "fixed height",
        ),
        ("preprocessor_config.json", {"image_mean": None}, "teacher-input", "no usable"),
        ("config.json", {"d_model": "wide"}, "teacher-unreadable", "d_model"),
        ("config.json", {"id2label": ["Car"]}, "teacher-classes", "not a table"),
    ],
)
def test_what_is_no_teacher_is_refused(
    name: str, changes: Any, code: str, words: str, folders: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as error:
        load(changed(folders["lw_detr"], tmp_path, name, **changes), INPUT)
    assert error.value.code == code


def test_missing_files_weights_and_library(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path / "nowhere", INPUT)
    assert error.value.code == "teacher-family"
    folder = changed(folders["lw_detr"], tmp_path, "config.json")
    tensors = load_file(folder / "model.safetensors")
    del tensors["class_embed.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"class_embed\.weight") as error:
        load(folder, INPUT)
    assert error.value.code == "teacher-unreadable"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"detr-distillery\[hf\]") as error:
        load(folders["lw_detr"], INPUT)
    assert error.value.code == "extra-missing"


def test_a_recipe_with_such_a_teacher_inherits_nothing(folders: Any, tiny: Recipe) -> None:
    with pytest.raises(ValueError, match="inherit: a detector of another library"):
        lesson(tiny, folders["lw_detr"], ["fitnet"], inherit=True)
    with pytest.raises(ValueError, match="there is no teacher whose"):
        Recipe.model_validate({**tiny.model_dump(), "teacher_classes": {"a": "b"}})
