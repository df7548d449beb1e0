"""Methods meet the other architectures: maps on request, refusals, extra groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detr.config import (
    AnchorQueriesConfig,
    BackboneConfig,
    DecoderConfig,
    DeformableEncoderConfig,
    DetachedRefinementConfig,
    DetectorConfig,
    LearnedQueriesConfig,
    OneToManyConfig,
    PlainDenoisingConfig,
)
from detr.errors import UserError
from detr.models import Detector, GroupOutput, QueryGroup, Target, build_detector
from detr.models.inherit import inherit
from distill.methods import build_methods
from distill.methods.d3etr import _predictions
from distill.methods.parts.attended_cells import attended_map
from distill.methods.parts.points import TargetAware

BACKBONE = BackboneConfig(
    name="resnet18", options={"channels": (8, 16, 32, 32), "layers": (1, 1, 1, 1)}
)
ONE_MAP = {"backbone.strides": (16,), "neck": {"levels": 1, "group_norm": False}}
DENSE = {
    **ONE_MAP,
    "encoder": {"kind": "dense", "layers": 1, "ffn": 64},
    "decoder.final_norm": True,
}
DETR = {
    **DENSE,
    "queries": LearnedQueriesConfig(number=6, reference="center", learned_content=False),
    "decoder.cross_attention": {"kind": "dense"},
    "heads.classes": {"kind": "softmax"},
}
CONDITIONAL = {
    **DENSE,
    "queries": LearnedQueriesConfig(number=6, reference="mlp", learned_content=False),
    "decoder.cross_attention": {"kind": "conditional"},
}
DAB = {
    **CONDITIONAL,
    "encoder.scaled_positions": True,
    "queries": AnchorQueriesConfig(number=6, learned_content=False),
    "decoder.refinement": DetachedRefinementConfig(shared_heads=True),
}
SHARED = {
    "decoder.refinement": DetachedRefinementConfig(shared_heads=True),
    "decoder.shared_layers": True,
}
DECODERS = {"detr": DETR, "conditional": CONDITIONAL, "dab": DAB}


def tiny(**changes: Any) -> Detector:
    torch.manual_seed(0)
    config = DetectorConfig(
        num_classes=3,
        width=32,
        attention_heads=4,
        backbone=BACKBONE,
        encoder=DeformableEncoderConfig(layers=1, ffn=64),
        queries=LearnedQueriesConfig(number=6),
        decoder=DecoderConfig(layers=2, ffn=64),
    )
    return build_detector(config.replace(**changes)).eval()


@pytest.mark.parametrize("changes", DECODERS.values(), ids=DECODERS)
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
    weights = torch.tensor([[0.5, 0, 0, 0, 0, 2.0]])
    maps = asked.attention[0].weights.mean(1)
    found = attended_map(asked.attention[0], memory.shapes, weights)
    torch.testing.assert_close(found, 0.5 * maps[:, 0] + 2 * maps[:, 5])


@pytest.mark.slow
def test_what_a_method_cannot_read_is_refused():
    softmax = tiny(**DETR)
    with pytest.raises(UserError, match="softmax") as caught:
        build_methods([{"kd_detr": {}}], softmax, softmax)
    assert caught.value.code == "method-scores"
    dense, deformable = tiny(**CONDITIONAL), tiny(**ONE_MAP)
    with pytest.raises(UserError, match="not alike") as caught:
        build_methods([{"d3etr": {"fixed": 0}}], deformable, dense)
    assert caught.value.code == "method-attention"
    with pytest.raises(UserError, match="must agree") as caught:
        build_methods([{"d3etr": {}}], dense, softmax)
    assert caught.value.code == "method-scores"
    build_methods([{"d3etr": {"cross_attention": False}}], deformable, dense)
    build_methods([{"fitnet": {}}], softmax, softmax)


def test_target_aware_queries_say_they_are_for_denoising():
    teacher = tiny(**DAB, **{"queries.denoising": PlainDenoisingConfig(groups=2)})
    target = Target(torch.full((1, 4), 0.5), torch.tensor([2]), torch.zeros(0, 4))
    group = TargetAware(teacher, 1, 0.0)("x", [target], [torch.Generator()])
    assert teacher.denoiser is not None
    torch.testing.assert_close(
        group.content[0, 0, :-1], teacher.denoiser.label_embedding.weight[2].detach()
    )
    assert float(group.content[0, 0, -1]) == 1.0


def test_a_shared_layer_inherits_the_last_and_is_inherited_by_all():
    shared = tiny(**SHARED)
    apart = tiny(**{**SHARED, "decoder.shared_layers": False})
    found = inherit(shared, apart).inherited
    assert found["decoder.layers.0.ffn.expand.weight"] == "decoder.layers.1.ffn.expand.weight"
    found = inherit(apart, shared).inherited
    assert found["decoder.layers.1.ffn.expand.weight"] == "decoder.layers.0.ffn.expand.weight"


def test_stable_dino_keeps_the_one_to_many_losses(build, take_step):
    many = OneToManyConfig(queries=8, repeat=2)
    changes = {"queries.one_to_many": many, "decoder.refinement.kind": "detach"}
    student = build(query="two_stage", **changes).train()
    methods = build_methods([{"stable_dino": {}}], student, None)
    losses = methods[0].detection_losses(take_step(student, None, methods))
    assert losses is not None
    assert {"one_to_many/class", "one_to_many_proposals/l1", "own/giou"} <= set(losses)


def test_an_adaptor_on_fused_memory(build, take_step):
    student, teacher = build(encoder={"fusion": "simple"}).train(), build(1).eval()
    methods = build_methods([{"qskd": {"adaptor_layers": 1}}], student, teacher)
    losses = methods[0].losses(take_step(student, teacher, methods))
    assert losses["qskd/features"].isfinite()


@pytest.mark.parametrize("changes", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("name", ["d3etr", "qskd"])
def test_dense_attention_teaches(name, changes, take_step, target):
    if name == "qskd" and changes is DETR:
        return  # the paper's selection is about sigmoid scores
    student, teacher = tiny(**changes).train(), tiny(**changes).requires_grad_(False)
    for seed, model in enumerate((student, teacher)):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    options = {"d3etr": {}, "qskd": {"threshold": -0.9}}[name]
    methods = build_methods([{name: options}], student, teacher)
    truth = [target([[0.3, 0.4, 0.4, 0.5]], [1]), target([], [])]
    losses = methods[0].losses(take_step(student, teacher, methods, truth))
    assert all(v.isfinite() for v in losses.values())
    part = {"d3etr": "d3etr/own_cross", "qskd": "qskd/features"}[name]
    assert losses[part] > 0
    sum(losses.values()).backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in student.encoder.parameters())
    # A student that is the teacher has nothing left to learn but the ground truth.
    methods = build_methods([{name: options}], teacher, teacher)
    losses = methods[0].losses(take_step(teacher, teacher, methods, truth))
    for key in ("d3etr/own_cross", "d3etr/own_self", "d3etr/fixed1_cross", "qskd/features"):
        if key in losses:
            assert float(losses[key]) == pytest.approx(0, abs=1e-6), key


def test_softmax_scores_are_compared_as_probabilities():
    logits = torch.tensor([[[1.0, -2.0, 0.5]]])
    output = GroupOutput(
        QueryGroup("own", torch.zeros(1, 1, 4), torch.zeros(1, 1, 2)),
        [logits], [torch.full((1, 1, 4), 0.5)], [], [], no_object=True,
    )  # fmt: skip
    found = _predictions(output, [0]).logits.sigmoid()
    torch.testing.assert_close(found, logits.softmax(-1))


PORTS: dict[str, dict[str, Any]] = {
    "deformable": {"query": "learned"},
    "dab-deformable": {
        "queries": AnchorQueriesConfig(number=7),
        "decoder": {
            "cross_attention": {"scaled_positions": True},
            "refinement": DetachedRefinementConfig(),
            "final_norm": False,
        },
    },
    "h-deformable": {
        "query": "two_stage",
        "queries.learned_content": True,
        "queries.one_to_many": OneToManyConfig(queries=8, repeat=2),
    },
    "dino, dense fusion": {"encoder.fusion": "dense"},
    "dino, u-like fusion": {"encoder.fusion": "u", "encoder.layers": 2},
    "h-deformable, simple fusion": {"query": "two_stage", "encoder.fusion": "simple"},
}


@pytest.mark.parametrize("changes", PORTS.values(), ids=PORTS.keys())
def test_stable_dino_on_its_ports(changes, build, take_step):
    student = build(**changes).train()
    methods = build_methods([{"stable_dino": {}}], student, None)
    losses = methods[0].detection_losses(take_step(student, None, methods))
    assert losses is not None and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    silent = [
        name
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert not silent


def test_od_detr_teaches_a_shared_decoder(build, take_step):
    student, teacher = (build(seed, query="learned", **SHARED) for seed in (2, 1))
    student, teacher = student.train(), teacher.requires_grad_(False)
    methods = build_methods([{"od_detr": {}}], student, teacher.eval())
    step = take_step(student, teacher, methods)
    assert len(student.decoder.layers) == len(student.decoder.box_heads) == 1
    assert len(step.student_outputs["own"].boxes) == 2
    losses = methods[0].detection_losses(step) | methods[0].losses(step)
    assert all(v.isfinite() for v in losses.values()) and losses["own/class"] > 0
    sum(losses.values()).backward()
    # Both stages teach the one layer, each from a reference without gradient (section 2.8).
    assert float(student.decoder.layers[0].ffn.expand.weight.grad.abs().sum()) > 0
    assert all(not r.requires_grad for r in step.student_outputs["own"].references[1:])
