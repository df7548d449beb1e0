"""The teacher is checked before anything is learned from it, and never changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.config import ClassMap, DetectorConfig
from detr.data import PreprocessConfig, open_dataset
from detr.data.synth import generate
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models import Detector, build_detector, save_model
from distill.distributed import join
from distill.recipe import Recipe
from distill.teachers.chosen_classes import ChosenClasses
from distill.teachers.open import load_teacher, open_teacher, tell_ap
from distill.training.loop import train_step
from distill.training.run_dir import RunDir
from distill.training.state import set_up

INPUT = PreprocessConfig(size=(64, 96))
DETECTOR: dict[str, Any] = {
    "backbone": {"name": "test_resnet", "strides": (8, 16)},
    "neck": {"levels": 2},
    "width": 16,
    "attention_heads": 2,
    "encoder": {"kind": "deformable", "layers": 1, "ffn": 16, "points": 2},
    "queries": {"kind": "mixed", "number": 5, "denoising": {"number": 4}},
    "decoder": {
        "layers": 2,
        "ffn": 16,
        "cross_attention": {"kind": "deformable", "points": 2},
        "refinement": {"kind": "look_forward_twice"},
        "final_norm": True,
    },
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    generate(folder, 5, (64, 96), seed=0)
    return folder


@pytest.fixture(scope="module")
def classes(scenes: Path) -> ClassMap:
    return open_dataset(f"kitti:{scenes}:train").classes


@pytest.fixture()
def write_teacher(tmp_path: Path, classes: ClassMap) -> Any:
    def write(
        names: tuple[str, ...] = classes.names, preprocess: PreprocessConfig = INPUT, **changes: Any
    ) -> Path:
        torch.manual_seed(5)
        config = DetectorConfig(num_classes=len(names), **DETECTOR, **changes)
        info = ModelInfo(
            detector=config,
            classes=ClassMap(names=names, category_ids=tuple(range(1, len(names) + 1))),
            preprocess=preprocess,
            provenance={"ap": 0.5},
        )
        save_model(tmp_path / "teacher.safetensors", build_detector(config), info)
        return tmp_path / "teacher.safetensors"

    return write


def recipe(scenes: Path, teacher: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "tiny",
        "data": {"train": f"kitti:{scenes}:train", "val": f"kitti:{scenes}:val"},
        "input": {"size": (64, 96)},
        "detector": DETECTOR,
        "teacher": str(teacher),
        "methods": ["clockdistill"],
        "steps": 3,
        "batch_size": 2,
    }
    return Recipe.model_validate({**settings, **changes})


def test_a_good_teacher_is_frozen(write_teacher: Any, classes: ClassMap) -> None:
    detector, columns = load_teacher(write_teacher(), classes, INPUT, {})
    assert columns == tuple(range(len(classes)))
    assert not detector.training
    assert not any(p.requires_grad for p in detector.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: ("Auto", *names[1:]), "the teacher does not know {0}; it knows Auto, {1}"),
        (lambda names: names[:-1], "the teacher does not know {last}"),
    ],
)
def test_unknown_classes_are_named(
    change: Any, words: str, write_teacher: Any, classes: ClassMap
) -> None:
    path = write_teacher(change(classes.names))
    with pytest.raises(UserError) as error:
        load_teacher(path, classes, INPUT, {})
    assert error.value.code == "teacher-classes"
    assert str(path) in error.value.message
    assert words.format(*classes.names, last=classes.names[-1]) in error.value.message


def test_more_classes_in_another_order_are_chosen_by_name(
    write_teacher: Any, scenes: Path, classes: ClassMap
) -> None:
    names = ("Boat", *reversed(classes.names[1:]), "Auto")
    wanted = recipe(
        scenes, write_teacher(names), inherit=True, teacher_classes={classes.names[0]: "Auto"}
    )
    opened = open_teacher(wanted, classes, torch.device("cpu"))
    count = len(classes)
    assert isinstance(opened.teacher, ChosenClasses) and opened.detector is opened.teacher.teacher
    assert opened.columns == (count, *range(count - 1, 0, -1))
    assert opened.teacher.facts.num_classes == count
    # Its detections speak of the data's classes and keep their scores.
    images, sizes = torch.randn(2, 3, 64, 96), torch.full((2, 2), 64.0)
    limit = 5 * (count + 1)
    opened.teacher.limit = limit
    full = Detector(opened.detector.config.replace(detections=limit), pretrained=False)
    full.load_state_dict(opened.detector.state_dict())
    _, scores, labels = opened.teacher(images, sizes, sizes)
    _, all_scores, all_labels = full.eval()(images, sizes, sizes)
    for ours, column in enumerate(opened.columns):
        torch.testing.assert_close(
            scores[labels == ours].sort().values, all_scores[all_labels == column].sort().values
        )


def test_other_names_without_a_teacher_are_refused(scenes: Path, write_teacher: Any) -> None:
    with pytest.raises(UserError, match="the data has no Boat") as error:
        wanted = recipe(scenes, write_teacher(), teacher_classes={"Boat": "Car"})
        open_teacher(wanted, open_dataset(str(wanted.data.train)).classes, torch.device("cpu"))
    assert error.value.code == "teacher-classes"


def test_other_normalization_is_refused(write_teacher: Any, classes: ClassMap) -> None:
    other = PreprocessConfig(size=(64, 96), mean=(0, 0, 0), std=(255, 255, 255))
    with pytest.raises(UserError) as error:
        load_teacher(write_teacher(preprocess=other), classes, INPUT, {})
    assert error.value.code == "teacher-input"
    # Another canvas is no obstacle: the teacher is measured on the student's.
    load_teacher(write_teacher(preprocess=PreprocessConfig(size=(128, 96))), classes, INPUT, {})


def test_ap_is_told_and_a_weak_teacher_refused(
    write_teacher: Any, scenes: Path, classes: ClassMap
) -> None:
    weights, val, said = write_teacher(), open_dataset(f"kitti:{scenes}:val"), list[str]()
    plain = recipe(scenes, weights)
    opened = open_teacher(plain, classes, torch.device("cpu"))
    teacher = opened.detector
    assert opened.path == weights and teacher is opened.teacher
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    tell_ap(plain, opened, val, said.append)
    assert len(said) == 1
    assert f"on {len(val)} images" in said[0]

    demanding = recipe(scenes, weights, min_teacher_ap=0.9)
    with pytest.raises(UserError, match=r"AP 0\.0\d\d on .* at least 0\.900") as error:
        tell_ap(demanding, opened, val, said.append)
    assert (error.value.code, error.value.exit_status) == ("teacher-weak", 3)

    with pytest.raises(UserError) as error:
        tell_ap(demanding, opened, None, said.append)
    assert error.value.code == "teacher-unmeasured"
    tell_ap(plain, opened, None, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("masks", [False, True])
def test_a_teacher_with_masks_teaches_either_kind_of_student(
    masks: bool, write_teacher: Any, tmp_path: Path
) -> None:
    """Data without masks measures its boxes, data with masks both."""
    kind = "coco" if masks else "kitti"
    generate(tmp_path / "data", 5, (64, 96), seed=0, format=kind)
    val, said = open_dataset(f"{kind}:{tmp_path / 'data'}:val"), list[str]()
    heads = {"heads": {"masks": {"width": 8, "channels": 8}}}
    weights = write_teacher(val.classes.names, **heads)
    detector = DETECTOR | (heads if masks else {})
    wanted = recipe(tmp_path / "data", weights, detector=detector)
    opened = open_teacher(wanted, val.classes, torch.device("cpu"))
    assert opened.teacher.facts.masks
    tell_ap(wanted, opened, val, said.append)
    assert len(said) == 1 and ("mask AP" in said[0]) == masks


def test_training_never_changes_the_teacher(
    write_teacher: Any, scenes: Path, tmp_path: Path
) -> None:
    wanted = recipe(scenes, write_teacher(), inherit=True)
    state = set_up(wanted, RunDir(tmp_path / "run", wanted), join())
    assert state.teacher is not None
    teacher, student = (copy.deepcopy(m.state_dict()) for m in (state.teacher, state.student))
    torch.testing.assert_close(student["source.content.weight"], teacher["source.content.weight"])
    for index in range(2):
        values = train_step(state, state.batches.batch(index), index)
        assert values["clockdistill/memory"] > 0
    assert not state.teacher.training
    for name, tensor in state.teacher.state_dict().items():
        torch.testing.assert_close(tensor, teacher[name], rtol=0, atol=0, msg=name)
    moved = [n for n, x in state.student.state_dict().items() if not torch.equal(x, student[n])]
    assert any(name.startswith("decoder.layers") for name in moved)
