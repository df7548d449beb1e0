"""Weights of masks in detectors that are made of others: extracted, inherited, started from."""

from __future__ import annotations

import re

import pytest
import torch

from detr.config import ClassMap
from detr.data import PreprocessConfig
from detr.model_info import ModelInfo
from detr.models import build_detector, save_model
from detr.models.extract import extract_layers
from detr.models.inherit import inherit
from detr.models.start import start
from detr.presets import preset

MASKS = re.compile(r"(?:pixels|decoder\.mask_heads)\.")
# Mask DINO's heads are shared by all layers, those of a light head on DINO are not.
FAMILIES = ["mask-dino", "dino"]


def detector(family, seed=1, encoder=3, decoder=3, masks=16, classes=3):
    config = preset(f"{family}-r18", classes, pretrained=False).replace(
        width=32,
        attention_heads=4,
        backbone={"name": "test_resnet"},
        encoder={"layers": encoder, "ffn": 32},
        decoder={"layers": decoder, "ffn": 32},
        queries={"number": 12, "denoising": {"number": 6}},
        heads={"masks": None if masks is None else {"width": masks, "channels": 16}},
        detections=10,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build_detector(config, pretrained=False).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def of_masks(model):
    return {name: x for name, x in model.state_dict().items() if MASKS.match(name)}


def first_and_last(modules):
    """Of three; a single one is shared."""
    return torch.nn.ModuleList([modules[0], modules[2]]) if len(modules) == 3 else modules


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extract_has_the_masks_of_its_layers(family, batch):
    whole = detector(family)
    cut = extract_layers(whole, encoder=[0, 2], decoder=[0, 2])
    assert len(cut.decoder.mask_heads) == (1 if family == "mask-dino" else 2)
    with torch.no_grad():
        found = cut(*batch)
        # The same from the whole detector, its other layers taken out by hand.
        whole.encoder.layers = first_and_last(whole.encoder.layers)
        for name in ("layers", "class_heads", "box_heads", "mask_heads"):
            setattr(whole.decoder, name, first_and_last(getattr(whole.decoder, name)))
        whole.decoder.config = cut.config.decoder
        wanted = whole(*batch)
    assert len(found) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallower_student_inherits_masks(family):
    teacher, student = detector(family), detector(family, seed=2, encoder=1, decoder=2)
    report = inherit(student, teacher)
    assert not [name for name in report.skipped if MASKS.match(name)]
    theirs = teacher.state_dict()
    for name, x in of_masks(student).items():
        # Of three layers the first and the last.
        source = name.replace("mask_heads.1", "mask_heads.2")
        assert report.inherited[name] == source
        assert torch.equal(x, theirs[source])


def test_masks_of_another_width_are_the_students_own():
    teacher, student = detector("dino"), detector("dino", seed=2, masks=8)
    before = of_masks(student)
    kept = {name: x.clone() for name, x in before.items()}
    report = inherit(student, teacher)
    own = {name for name in report.skipped if MASKS.match(name)}
    assert {"pixels.project.weight", "decoder.mask_heads.0.layers.2.weight"} <= own
    # A head is taken whole or not at all.
    assert all(name in own for name in kept if "mask_heads" in name)
    assert all(torch.equal(student.state_dict()[name], kept[name]) for name in own)


@pytest.mark.parametrize("masks", [16, None])
def test_a_start_with_other_classes(masks, tmp_path):
    """Masks know no classes; a start without masks leaves them as they were made."""
    source = detector("mask-dino") if masks else detector("dino", masks=None)
    names = ("person", "car", "boat")
    known = ClassMap(names=names, category_ids=(1, 2, 3))
    info = ModelInfo(
        detector=source.config, classes=known, preprocess=PreprocessConfig(size=(64, 64))
    )
    save_model(tmp_path / "source.safetensors", source, info)
    model = detector("mask-dino", seed=2, classes=2)
    kept = {name: x.clone() for name, x in of_masks(model).items()}
    wanted = ClassMap(names=("car", "cat"), category_ids=(1, 2))
    report, _ = start(model, tmp_path / "source.safetensors", wanted, {})
    theirs = source.state_dict()
    for name, x in of_masks(model).items():
        assert torch.equal(x, theirs[name] if masks else kept[name])
        assert (name in report.inherited) == bool(masks)
    row = "decoder.class_heads.0.weight"
    assert torch.equal(model.state_dict()[row][0], theirs[report.inherited[row]][1])
