"""Inheriting weights by name and layer map."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from detr.config import (
    BackboneConfig,
    ContrastiveDenoisingConfig,
    DecoderConfig,
    DeformableCrossAttentionConfig,
    DeformableEncoderConfig,
    DetachedRefinementConfig,
    DetectorConfig,
    LearnedQueriesConfig,
    LookForwardTwiceConfig,
    MixedQueriesConfig,
    NeckConfig,
)
from detr.errors import UserError
from detr.models import Detector, build_detector
from detr.models.inherit import inherit
from detr.models.transfer import spread_layers

# Of as many channels as no other.
OTHER = BackboneConfig(name="resnet18", strides=(8, 16))


def detector(seed: int, **changes: Any) -> Detector:
    config = DetectorConfig(
        num_classes=3,
        width=32,
        attention_heads=4,
        backbone=BackboneConfig(name="test_resnet", strides=(8, 16)),
        neck=NeckConfig(levels=3),
        encoder=DeformableEncoderConfig(layers=3, ffn=32, points=2),
        queries=MixedQueriesConfig(number=5, denoising=ContrastiveDenoisingConfig(number=4)),
        decoder=DecoderConfig(
            layers=3,
            ffn=32,
            cross_attention=DeformableCrossAttentionConfig(points=2),
            refinement=LookForwardTwiceConfig(),
            final_norm=True,
        ),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_detector(config.replace(**changes))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 6, (0, 1, 2, 3, 4, 5)),
        (3, 6, (0, 2, 5)),
        (2, 6, (0, 5)),
        (1, 6, (5,)),
        (4, 3, (0, 1, 1, 2)),
        (0, 6, ()),
        (3, 0, ()),
    ],
)
def test_layers_spread_from_first_to_last(
    student: int, teacher: int, expected: tuple[int, ...]
) -> None:
    assert spread_layers(student, teacher) == expected


def test_equal_models_share_everything() -> None:
    teacher, student = detector(1), detector(2)
    before = copy.deepcopy(teacher.state_dict())
    report = inherit(student, teacher)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert set(report.inherited) == set(before) and not report.skipped and not report.left
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


OTHER_BACKBONE = {"name": "test_resnet", "strides": (8, 16), "options": {"stem_width": 8}}


def test_the_report_is_a_line_of_parts() -> None:
    report = inherit(detector(2, backbone=OTHER_BACKBONE), detector(1))
    own = len(report.skipped)
    total = own + len(report.inherited)
    assert report.text() == (
        f"inherited {total - own} of {total} tensors: neck, encoder, queries, decoder, heads, "
        "denoising; own: backbone"
    )
    assert "inherited neck.projections.0.0.weight" in report.details()
    fewer = inherit(detector(2, **{"encoder.layers": 1, "decoder.layers": 2}), detector(1))
    assert (
        "inherited decoder.layers.1.ffn.norm.weight from decoder.layers.2.ffn.norm.weight"
        in fewer.details()
    )
    # Of six projections and levels some agree: a part in part is told with its share.
    some = inherit(detector(2, encoder={"ffn": 48}, decoder={"ffn": 48}), detector(1)).text()
    assert re.search(r"decoder \(\d+ of \d+\)", some) and len(some) < 200


def test_a_backbone_is_taken_whole_or_not_at_all() -> None:
    teacher = detector(1)
    other = detector(2, backbone=OTHER_BACKBONE)
    before = copy.deepcopy(other.backbone.state_dict())
    report = inherit(other, teacher)
    torch.testing.assert_close(other.backbone.state_dict(), before, rtol=0, atol=0)
    reasons = {r for n, r in report.skipped.items() if n.startswith("backbone.")}
    assert reasons == {"the teacher's backbone is another"}
    # A backbone that ends earlier is the same one as far as it goes.
    short = detector(3, backbone={"strides": (8,)}, neck={"levels": 3})
    assert not any(n.startswith("backbone.") for n in inherit(short, teacher).skipped)
    assert any(n.startswith("backbone.") for n in inherit(teacher, short).skipped)


def test_fewer_layers_follow_the_map() -> None:
    teacher = detector(1)
    student = detector(2, **{"encoder.layers": 1, "decoder.layers": 2})
    inherit(student, teacher)
    ours, theirs = student.state_dict(), teacher.state_dict()

    def same(mine: str, yours: str) -> bool:
        return torch.equal(ours[mine], theirs[yours])

    assert same("encoder.layers.0.ffn.expand.weight", "encoder.layers.2.ffn.expand.weight")
    assert same("decoder.layers.0.ffn.expand.weight", "decoder.layers.0.ffn.expand.weight")
    assert same("decoder.layers.1.ffn.expand.weight", "decoder.layers.2.ffn.expand.weight")
    assert same("decoder.class_heads.1.weight", "decoder.class_heads.2.weight")
    assert same("decoder.box_heads.1.layers.0.weight", "decoder.box_heads.2.layers.0.weight")
    report = inherit(student, teacher, encoder=[0], decoder=[1, 1])
    ours = student.state_dict()
    assert same("encoder.layers.0.ffn.expand.weight", "encoder.layers.0.ffn.expand.weight")
    assert same("decoder.layers.1.ffn.expand.weight", "decoder.layers.1.ffn.expand.weight")
    assert report.inherited["decoder.class_heads.0.bias"] == "decoder.class_heads.1.bias"
    for wrong in ([0], [0, 3], [-1, 0]):
        with pytest.raises(UserError, match="decoder") as error:
            inherit(student, teacher, decoder=wrong)
        assert error.value.code == "inherit-layer-map"


def test_shared_heads_follow_the_last_layer_and_back() -> None:
    own, shared = detector(1), detector(2, **{"decoder.refinement.shared_heads": True})
    inherit(shared, own)
    torch.testing.assert_close(
        shared.state_dict()["decoder.class_heads.0.weight"],
        own.state_dict()["decoder.class_heads.2.weight"],
    )
    again = detector(3)
    inherit(again, shared)
    for layer in range(3):
        torch.testing.assert_close(
            again.state_dict()[f"decoder.class_heads.{layer}.weight"],
            shared.state_dict()["decoder.class_heads.0.weight"],
        )


def test_parts_of_another_shape_keep_all_their_weights() -> None:
    teacher, student = (
        detector(1),
        detector(
            2, neck={"levels": 2}, queries={"number": 4}, encoder={"ffn": 48}, decoder={"ffn": 48}
        ),
    )
    before = copy.deepcopy(student.state_dict())
    report = inherit(student, teacher)
    after = student.state_dict()
    # Fewer levels change the sampling of every layer, so no layer is half the teacher's.
    for name in after:
        if ".layers." in name and name.startswith(("encoder", "decoder.layers")):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
            assert name in report.skipped
    assert report.skipped["source.content.weight"] == "shape [4, 32], the teacher's is [5, 32]"
    assert "does not agree" in report.skipped["decoder.layers.0.ffn.norm.weight"]
    for part in (
        "neck.projections.1.0.weight",
        "decoder.class_heads.2.weight",
        "denoiser.label_embedding.weight",
        "source.proposals.class_head.weight",
    ):
        assert part in report.inherited
    assert report.text().startswith(f"inherited {len(report.inherited)} of {len(after)} tensors")
    assert "encoder" in report.text().partition("; own: ")[2]
    assert len(report.details()) == len(after) + len(report.left)
    assert "left neck.projections.2.0.weight" in report.details()
    assert any(
        line.startswith("own decoder.layers.0.ffn.norm.weight: the rest of decoder.layers.0")
        for line in report.details()
    )


def test_no_encoder_and_other_query_kind() -> None:
    teacher = detector(1, encoder={"layers": 0})
    report = inherit(detector(2), teacher)
    assert report.skipped["encoder.layers.1.norm.weight"] == "the teacher has none"
    learned = detector(
        3,
        queries=LearnedQueriesConfig(number=5),
        decoder={"refinement": DetachedRefinementConfig(), "final_norm": False},
    )
    assert inherit(learned, teacher).skipped["source.embedding.weight"] == "the teacher has none"


def test_nothing_to_inherit_is_an_error() -> None:
    with pytest.raises(UserError, match="width 16 and 32") as error:
        inherit(detector(2, width=16, num_classes=2, backbone=OTHER), detector(1))
    assert error.value.code == "inherit-nothing"
