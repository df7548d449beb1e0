"""Starting from a checkpoint: other classes, depth and queries; and freezing parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from detr.config import ClassMap, DetectorConfig, ProjectorNeckConfig, VitBackboneConfig
from detr.data import PreprocessConfig
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models import Detector, Target, build_detector, save_model
from detr.models.start import start
from detr.models.transfer import Source, transfer

KNOWN = ("person", "car", "boat")
KINDS: dict[str, dict[str, Any]] = {
    "dino": {"queries": {"kind": "mixed", "number": 5, "denoising": {"number": 4}}},
    "two_stage": {"queries": {"kind": "two_stage", "number": 5}},
    "grouped": {"queries": {"kind": "grouped", "number": 5, "groups": 3}},
    "dn": {
        "queries": {"kind": "anchors", "number": 5, "denoising": {"groups": 2}},
        "decoder": {"cross_attention": {"kind": "deformable", "scaled_positions": True}},
    },
    "detr": {
        "backbone": {"strides": (32,)},
        "neck": {"levels": 1, "group_norm": False},
        "encoder": {"kind": "dense", "layers": 1, "ffn": 32},
        "queries": {"number": 5, "reference": "center", "learned_content": False},
        "decoder": {
            "cross_attention": {"kind": "dense"},
            "refinement": {"kind": "none"},
        },
        "heads": {"classes": {"kind": "softmax"}},
    },
}


def classes(*names: str) -> ClassMap:
    return ClassMap(names=names, category_ids=tuple(range(1, len(names) + 1)))


def detector(kind: str, number: int, seed: int, **changes: Any) -> Detector:
    config = DetectorConfig(
        num_classes=number,
        width=32,
        attention_heads=4,
        backbone={"name": "test_resnet", "strides": (8, 16)},
        neck={"levels": 2},
        encoder={"kind": "deformable", "layers": 1, "ffn": 32, "points": 2},
        decoder={
            "layers": 2,
            "ffn": 32,
            "cross_attention": {"kind": "deformable", "points": 2},
            "refinement": {"kind": "detach"},
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_detector(config.replace(**KINDS[kind]).replace(**changes))


def saved(folder: Path, kind: str, **changes: Any) -> tuple[Path, Detector]:
    model = detector(kind, len(KNOWN), 1, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    info = ModelInfo(
        detector=model.config,
        classes=classes(*KNOWN),
        preprocess=PreprocessConfig(size=(64, 64)),
    )
    save_model(folder, model, info)
    return folder, model


def with_rows(kind: str) -> list[str]:
    return {
        "dino": [
            "decoder.class_heads.0.weight",
            "decoder.class_heads.1.bias",
            "source.proposals.class_head.weight",
            "denoiser.label_embedding.weight",
        ],
        "two_stage": ["decoder.class_heads.0.weight"],
        "grouped": [
            "source.proposals.class_head.weight",
            "source.further.1.proposals.class_head.bias",
        ],
        "dn": ["decoder.class_heads.0.weight", "denoiser.label_embedding.weight"],
        "detr": ["decoder.class_heads.0.weight", "decoder.class_heads.0.bias"],
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_classes_go_by_name(kind: str, tmp_path: Path) -> None:
    path, source = saved(tmp_path, kind)
    theirs = source.state_dict()
    student = detector(kind, 4, 2)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    report, info = start(student, path, classes("boat", "dog", "Auto", "cat"), {"Auto": "car"})
    after = student.state_dict()
    assert info.classes.names == KNOWN
    assert report.new_classes == [1, 3] and not report.skipped
    for name in with_rows(kind):
        for row, there in ((0, 2), (2, 1)):
            assert torch.equal(after[name][row], theirs[name][there]), name
        for row in (1, 3):
            assert torch.equal(after[name][row], before[name][row]), name
        # "No object" and "unknown label" come after the classes and are nobody's class.
        assert torch.equal(after[name][4:], theirs[name][3:]), name
    if kind == "two_stage":  # its first channel says "any object", whatever the classes
        name = "source.proposals.class_head.weight"
        assert torch.equal(after[name][0], theirs[name][0])
    for name in set(after) - set(with_rows(kind)):
        if "class_head" not in name:
            assert torch.equal(after[name], theirs[name]), name
    names = ("boat", "dog", "Auto", "cat")
    assert report.text("started with", names).endswith("; new classes: dog, cat")
    assert "new class dog: its rows are its own" in report.details("started with", names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_class_starts_like_one_that_kept_its_name(kind: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, kind)
    kept, renamed = detector(kind, 3, 2), detector(kind, 3, 2)
    start(kept, path, classes("boat", "dog", "car"), {})
    start(renamed, path, classes("boat", "dog", "Auto"), {"Auto": "car"})
    ours, theirs = kept.state_dict(), renamed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_depth_and_other_queries(tmp_path: Path) -> None:
    path, source = saved(tmp_path, "dino", decoder={"layers": 3}, encoder={"layers": 2})
    student = detector("dino", 3, 2, queries={"number": 7})
    report, _ = start(student, path, classes(*KNOWN), {})
    ours, theirs = student.state_dict(), source.state_dict()
    for mine, yours in (
        ("decoder.layers.1.ffn.expand.weight", "decoder.layers.2.ffn.expand.weight"),
        ("encoder.layers.0.ffn.expand.weight", "encoder.layers.1.ffn.expand.weight"),
        ("decoder.class_heads.1.weight", "decoder.class_heads.2.weight"),
    ):
        assert torch.equal(ours[mine], theirs[yours])
    assert set(report.skipped) == {"source.content.weight"}
    assert "decoder.layers.1.ffn.expand.weight" in report.left


def test_a_checkpoint_without_a_class_head_is_a_start(tmp_path: Path) -> None:
    path, source = saved(tmp_path, "detr")
    file = path / "model.safetensors"
    tensors = {name: x for name, x in load_file(file).items() if "class_heads" not in name}
    save_file(tensors, file)
    student = detector("detr", 2, 2)
    before = student.state_dict()["decoder.class_heads.0.weight"].clone()
    report, _ = start(student, path, classes("a", "b"), {})
    assert set(report.skipped) == {"decoder.class_heads.0.weight", "decoder.class_heads.0.bias"}
    after = student.state_dict()
    assert torch.equal(after["decoder.class_heads.0.weight"], before)
    name = "decoder.layers.1.ffn.expand.weight"
    assert torch.equal(after[name], source.state_dict()[name])


def test_what_cannot_be_started_from_is_told(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "dino")
    student = detector("dino", 2, 2)
    for names, renamed, code, words in (
        (("a", "b"), {"c": "car"}, "start-classes", "the data has no c"),
        (("a", "b"), {"a": "horse"}, "start-classes", "does not know horse; it knows person, car"),
    ):
        with pytest.raises(UserError, match=words) as error:
            start(student, path, classes(*names), renamed)
        assert error.value.code == code
    small = detector("dino", 2, 2, width=16, backbone={"options": {"stem_width": 8}})
    with pytest.raises(UserError, match="width 16 and 32") as error:
        start(small, path, classes("a", "b"), {})
    assert error.value.code == "start-nothing"
    # Scores of another kind are not taken for one another.
    softmax = detector("detr", 3, 2)
    report, _ = start(softmax, path, classes(*KNOWN), {})
    assert "its scores are softmax" in report.skipped["decoder.class_heads.0.weight"]


def test_frozen_parts_stay_as_they_are() -> None:
    model = detector("dino", 3, 1, dropout=0.5)
    assert model.freeze("backbone") and model.freeze("heads")
    assert not detector("detr", 3, 1).freeze("denoising")
    model.train()
    model.eval()
    model.train()  # a measurement in between changes nothing
    before = {name: x.clone() for name, x in model.state_dict().items()}
    images, sizes = torch.randn(2, 3, 64, 64), torch.full((2, 2), 64.0)
    target = Target(torch.rand(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4))
    memory = model.encode(images, sizes)
    outputs = model.decode(memory, model.queries(memory, [target, target]))
    torch.stack(
        [x.sum() for output in outputs for x in output.logits + output.boxes]
    ).sum().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.", "decoder.class_heads.", "decoder.box_heads."))
        assert parameter.requires_grad is not frozen, name
        if frozen:
            assert parameter.grad is None
    statistics = [n for n in before if n.startswith("backbone.") and "running" in n]
    assert statistics
    for name in statistics:
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert model.decoder.layers[0].training and not model.decoder.class_heads[0].training


def test_a_vision_transformer_is_taken_where_it_goes_on_beyond_the_last_map(
    small_preset: Callable[..., DetectorConfig],
) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"width": 24, "heads": 4, "side": 5, "windows": 2}
    longer, shorter = (
        build_detector(
            small_preset(
                "lwdetr",
                backbone=VitBackboneConfig(**shape, taps=taps),
                neck=ProjectorNeckConfig(blocks=1),
            )
        )
        for taps in ((1, 3), (1, 2))
    )
    report = transfer(shorter, Source("start", longer.config, longer.state_dict()))
    assert report.skipped == {} and any("blocks.2." in name for name in report.left)
    for name, tensor in shorter.state_dict().items():
        assert torch.equal(tensor, longer.state_dict()[name]), name
    # Another grid of positions is another backbone.
    other = small_preset(
        "lwdetr",
        backbone=VitBackboneConfig(**{**shape, "side": 6}, taps=(1, 3)),
        neck=ProjectorNeckConfig(blocks=1),
    )
    report = transfer(build_detector(other), Source("start", longer.config, longer.state_dict()))
    assert report.skipped["backbone.positions"] == "the start's backbone is another"
    assert "decoder.norm.weight" in report.inherited
