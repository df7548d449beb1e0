"""Methods meet the other architectures: maps on request, refusals, extra groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detr.config import BackboneConfig, DenoisingConfig, DetectorConfig, OneToManyConfig
from detr.errors import UserError
from detr.models import Detector, Target, build_detector
from detr.models.inherit import inherit
from distill.methods import build_methods
from distill.methods.points import TargetAware
from distill.methods.sampling import sampled

BACKBONE = BackboneConfig(
    name="resnet18", options={"channels": (8, 16, 32, 32), "layers": (1, 1, 1, 1)}
)
DENSE = {"levels": 1, "backbone": BACKBONE.model_copy(update={"strides": (16,)})}
ANCHORS = {"query": "anchors", "refine": "detach", "attention": "conditional"}


def tiny(**changes: Any) -> Detector:
    torch.manual_seed(0)
    base: dict[str, Any] = {"backbone": BACKBONE, "width": 32, "heads": 4, "ffn": 64}
    base |= {"num_classes": 3, "encoder_layers": 1, "decoder_layers": 2, "queries": 6}
    return build_detector(DetectorConfig(**{**base, **changes})).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {**DENSE, "attention": "dense", "classification": "softmax"},
        {**DENSE, "attention": "conditional"},
        {**DENSE, **ANCHORS, "shared_heads": True},
    ],
    ids=["dense", "conditional", "dab"],
)
def test_self_attention_maps_change_nothing(changes):
    detector = tiny(**changes)
    images, valid = torch.randn(1, 3, 64, 96), torch.tensor([[64.0, 96.0]])
    with torch.no_grad():
        memory = detector.encode(images, valid)
        plain = detector.decode(memory, detector.queries(memory))[0]
        asked = detector.decode(memory, detector.queries(memory), True, {"own"})[0]
    assert [m.shape for m in asked.self_attention] == [(1, 4, 6, 6)] * 2
    torch.testing.assert_close(asked.self_attention[0].sum(-1), torch.ones(1, 4, 6))
    torch.testing.assert_close(asked.boxes[-1], plain.boxes[-1])
    assert not plain.self_attention
    with pytest.raises(ValueError, match="no sampling points"):
        sampled(asked.attention[0])


def test_what_a_method_cannot_read_is_refused():
    softmax = tiny(**DENSE, attention="dense", classification="softmax")
    with pytest.raises(UserError, match="softmax") as caught:
        build_methods([{"kd_detr": {}}], softmax, softmax)
    assert caught.value.code == "method-scores"
    dense = tiny(**DENSE, attention="conditional")
    with pytest.raises(UserError, match="deformable") as caught:
        build_methods([{"d3etr": {}}], dense, dense)
    assert caught.value.code == "method-attention"
    build_methods([{"d3etr": {"cross_attention": False}}], dense, dense)
    build_methods([{"fitnet": {}}], softmax, softmax)


def test_target_aware_queries_say_they_are_for_denoising():
    noise = DenoisingConfig(contrastive=False, number=2)
    teacher = tiny(**DENSE, **ANCHORS, shared_heads=True, denoising=noise)
    target = Target(torch.full((1, 4), 0.5), torch.tensor([2]), torch.zeros(0, 4))
    group = TargetAware(teacher, 1, 0.0)("x", [target], torch.Generator())
    assert teacher.denoiser is not None
    torch.testing.assert_close(
        group.content[0, 0, :-1], teacher.denoiser.label_embedding.weight[2].detach()
    )
    assert float(group.content[0, 0, -1]) == 1.0


def test_a_shared_layer_inherits_the_last_and_is_inherited_by_all():
    shared = tiny(refine="detach", shared_heads=True, shared_decoder=True)
    apart = tiny(refine="detach", shared_heads=True)
    found = inherit(shared, apart).inherited
    assert found["decoder.layers.0.ffn.expand.weight"] == "decoder.layers.1.ffn.expand.weight"
    found = inherit(apart, shared).inherited
    assert found["decoder.layers.1.ffn.expand.weight"] == "decoder.layers.0.ffn.expand.weight"


def test_stable_dino_keeps_the_one_to_many_losses(build, take_step):
    many = OneToManyConfig(queries=8, repeat=2)
    student = build(query="two_stage", refine="detach", one_to_many=many).train()
    methods = build_methods([{"stable_dino": {}}], student, None)
    losses = methods[0].detection_losses(take_step(student, None, methods))
    assert losses is not None
    assert {"one_to_many/class", "one_to_many_proposals/l1", "own/giou"} <= set(losses)


def test_an_adaptor_on_fused_memory(build, take_step):
    student, teacher = build(memory_fusion="simple").train(), build(1).eval()
    methods = build_methods([{"qskd": {"adaptor_layers": 1}}], student, teacher)
    losses = methods[0].losses(take_step(student, teacher, methods))
    assert losses["qskd/features"].isfinite()
