"""Students of some of a teacher's layers."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from detr.config import BackboneConfig, ClassMap
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models import load_model, save_model
from detr.models.cli import model
from detr.models.extract import extract_layers

CONDITIONAL = {
    "backbone": BackboneConfig(name="test_resnet", strides=(32,)),
    "neck.levels": 1,
    "encoder": {"kind": "dense", "layers": 2, "ffn": 64},
    "decoder.cross_attention": {"kind": "conditional"},
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dino", {"encoder.fusion": "dense"}),
        ("refine", {"decoder": {"refinement": {"shared_heads": True}, "shared_layers": True}}),
        ("plain", CONDITIONAL),
    ],
)
def test_all_layers_are_the_teacher(kind, changes, make, batch):
    teacher = make(kind, **changes)
    student = extract_layers(teacher, [0, 1], [0, 1])
    assert student.config == teacher.config
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        for got, want in zip(student(*batch), teacher(*batch), strict=True):
            assert torch.equal(got, want)


def test_what_a_distribution_adds_to_the_scores_goes_with_its_layer(make):
    refinement = {"kind": "distribution", "bins": 8}
    decoder = {"layers": 3, "refinement": refinement, "evaluated_layers": 2}
    teacher = make("refine", decoder=decoder)
    student = extract_layers(teacher, None, [0, 2])
    assert student.config.decoder.answering_layers == 2
    theirs = teacher.state_dict()
    for name, x in student.state_dict().items():
        if name.startswith("decoder.refiner.qualities.1."):
            assert torch.equal(x, theirs[name.replace("qualities.1", "qualities.2")])
        elif name.startswith("decoder.refiner."):
            assert torch.equal(x, theirs[name])


def test_one_box_head_goes_with_every_layer(make):
    refinement = {"kind": "distribution", "bins": 8, "shared_boxes": True}
    teacher = make("refine", decoder={"layers": 3, "refinement": refinement})
    student = extract_layers(teacher, None, [1, 2])
    theirs, ours = teacher.state_dict(), student.state_dict()
    boxes = {name for name in ours if name.startswith("decoder.box_heads.")}
    assert boxes and boxes == {n for n in theirs if n.startswith("decoder.box_heads.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in boxes)


def test_layers_and_their_heads_are_the_named_ones(make, batch):
    teacher = make("dino", **{"encoder.layers": 3, "decoder.layers": 3})
    student = extract_layers(teacher, [1], [0, 2])
    assert (student.config.encoder.layers, student.config.decoder.layers) == (1, 2)
    with torch.no_grad():
        detections = student(*batch)
    # The same from the teacher, its other layers taken out by hand.
    encoder, decoder = teacher.encoder, teacher.decoder
    encoder.layers = torch.nn.ModuleList([encoder.layers[1]])
    for part in ("layers", "class_heads", "box_heads"):
        kept = [x for i, x in enumerate(getattr(decoder, part)) if i != 1]
        setattr(decoder, part, torch.nn.ModuleList(kept))
    decoder.config = student.config.decoder
    with torch.no_grad():
        for got, want in zip(detections, teacher(*batch), strict=True):
            assert torch.equal(got, want)


def test_no_encoder_remains_a_detector(make, batch):
    student = extract_layers(make("dino"), [], [1])
    assert student.encoder.level_embedding is None
    assert student(*batch)[0].shape == (2, 20, 4)


@pytest.mark.parametrize(
    ("encoder", "decoder", "changes", "code", "part"),
    [
        ([2], None, {}, "extract-layer-map", "no layer 2, only layers 0 to 1"),
        ([0], None, {"encoder.layers": 0}, "extract-layer-map", "no layer 0, only none"),
        (None, [-1], {}, "extract-layer-map", "decoder: the teacher has no layer -1"),
        (None, [1, 0], {}, "extract-layer-map", "1,0: name each layer once, in ascending"),
        ([0, 0], None, {}, "extract-layer-map", "encoder: 0,0"),
        (None, [], {}, "extract-layer-map", "at least one decoder layer"),
        ([0], None, {"encoder.fusion": "u"}, "extract-impossible", "fusion joins all 2"),
        ([], None, {"encoder.fusion": "simple"}, "extract-impossible", "needs encoder layers"),
    ],
)
def test_bad_maps_are_refused(encoder, decoder, changes, code, part, make):
    with pytest.raises(UserError, match=part) as caught:
        extract_layers(make("refine", **changes), encoder, decoder)
    assert caught.value.code == code


def test_a_conditional_decoder_keeps_its_first_layer(make):
    with pytest.raises(UserError, match="layer 0 alone reads positions"):
        extract_layers(make("plain", **CONDITIONAL), None, [1])


def test_command(tmp_path, make, batch):
    teacher = make("two_stage")
    info = ModelInfo(
        detector=teacher.config,
        classes=ClassMap(names=("a", "b", "c"), category_ids=(1, 2, 3)),
        preprocess=PreprocessConfig(size=(96, 160)),
        provenance={"ap": 0.5, "step": 7},
    )
    save_model(tmp_path / "t.safetensors", teacher, info)
    arguments = ["extract", f"{tmp_path}/t.safetensors", "--encoder", "none", "--decoder", "1"]
    arguments += ["--out", f"{tmp_path}/s.safetensors"]
    result = CliRunner().invoke(model, [*arguments, "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert (told["encoder"], told["decoder"]) == ([], [1])
    student, found = load_model(tmp_path / "s.safetensors")
    assert found.provenance["extracted"]["decoder"] == [1]
    assert found.provenance["step"] == 7 and "ap" not in found.provenance
    wanted = extract_layers(teacher, [], [1])
    with torch.no_grad():
        for got, want in zip(student(*batch), wanted(*batch), strict=True):
            assert torch.equal(got, want)
    result = CliRunner().invoke(model, arguments, catch_exceptions=False)
    assert "encoder layers none, decoder layers 1" in result.stdout
    result = CliRunner().invoke(model, [*arguments, "--encoder", "x"], catch_exceptions=False)
    assert result.exit_code != 0 and "expected numbers such as 0,2,5" in result.stderr


def test_a_shipped_model_is_cut_by_its_name(tmp_path):
    out = tmp_path / "cut.safetensors"
    arguments = ["extract", "demo-teacher", "--encoder", "2", "--decoder", "0", "--out", str(out)]
    CliRunner().invoke(model, arguments, catch_exceptions=False)
    _, info = load_model(out)
    assert info.provenance["extracted"]["from"] == "demo-teacher"
