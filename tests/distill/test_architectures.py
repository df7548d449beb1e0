"""Every architecture learns from the detection loss and exports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detr.config import BackboneConfig, DenoisingConfig, DetectorConfig, OneToManyConfig
from detr.models import Detector, Target, build_detector
from distill.criterion import LossWeights, detection_losses

BACKBONE = BackboneConfig(
    name="resnet18", options={"channels": (8, 16, 32, 32), "layers": (1, 1, 1, 1)}
)
DENSE: dict[str, Any] = {
    "levels": 1,
    "pe_offset": 0.0,
    "backbone": BACKBONE.model_copy(update={"strides": (16,)}),
}
ANCHORS = {"query": "anchors", "refine": "look_forward_twice", "shared_heads": True}
DN = DenoisingConfig(contrastive=False, number=2, label_noise=0.2, box_noise=0.4)
KINDS: dict[str, dict[str, Any]] = {
    "detr": {**DENSE, "attention": "dense", "classification": "softmax"},
    "conditional": {**DENSE, "attention": "conditional"},
    "dab": {**DENSE, **ANCHORS, "attention": "conditional", "activation": "prelu", "patterns": 2},
    "dn_dab": {**DENSE, **ANCHORS, "attention": "conditional", "denoising": DN},
    "dab_deformable": {"query": "anchors", "refine": "detach", "random_anchors": True},
    "dn_deformable": {"query": "anchors", "refine": "detach", "denoising": DN},
    "h_detr": {
        "query": "two_stage",
        "learned_content": True,
        "refine": "look_forward_twice",
        "one_to_many": OneToManyConfig(queries=20, repeat=3),
    },
    "shared": {"refine": "detach", "shared_heads": True, "shared_decoder": True},
    "simple": {"refine": "detach", "memory_fusion": "simple"},
    "u": {"refine": "detach", "memory_fusion": "u"},
    "dense": {"refine": "detach", "memory_fusion": "dense"},
    "five_scale": {
        "levels": 5,
        "backbone": BACKBONE.model_copy(update={"strides": (4, 8, 16, 32)}),
        "query": "mixed",
        "refine": "look_forward_twice",
        "denoising": DenoisingConfig(number=4),
    },
}
TARGETS = [
    Target(
        torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.3, 0.5]]),
        torch.tensor([0, 2]),
        torch.zeros(0, 4),
    ),
    Target(torch.tensor([[0.5, 0.5, 0.4, 0.3]]), torch.tensor([1]), torch.zeros(0, 4)),
]


def tiny(kind: str) -> Detector:
    torch.manual_seed(0)
    base: dict[str, Any] = {"backbone": BACKBONE, "width": 32, "heads": 4, "ffn": 64}
    base |= {"num_classes": 3, "encoder_layers": 3, "decoder_layers": 2, "queries": 12}
    return build_detector(DetectorConfig(**{**base, **KINDS[kind]}))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    images[0, :, 80:] = 0
    return images, torch.tensor([[80.0, 160.0], [96.0, 160.0]])


def loss_of(detector: Detector) -> torch.Tensor:
    memory = detector.encode(*batch())
    groups = detector.queries(memory, TARGETS, torch.Generator().manual_seed(0))
    outputs = {o.group.role: o for o in detector.decode(memory, groups)}
    losses = detection_losses(outputs, TARGETS, torch.tensor(3.0), LossWeights())
    return sum(losses.values(), torch.zeros(()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_lowers_the_loss_and_reaches_every_parameter(kind):
    detector = tiny(kind).train()
    detector.backbone.eval()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5)
    before = loss_of(detector)
    before.backward()
    idle = [name for name, p in detector.named_parameters() if p.grad is None]
    assert idle == []
    optimizer.step()
    assert loss_of(detector) < before


@pytest.mark.parametrize("kind", KINDS)
def test_inference_has_only_its_own_queries_and_exports(kind):
    detector = tiny(kind).eval()
    images, valid = batch()
    with torch.no_grad():
        memory = detector.encode(images, valid)
        groups = detector.queries(memory)
        assert [group.role for group in groups] == ["own"]
        output = detector.decode(memory, groups, attention=True)[0]
        wanted = detector(images, valid, valid)
        program = torch.export.export(detector, (images, valid, valid), strict=False)
        for got, want in zip(program.module()(images, valid, valid), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert len(output.attention) == 2
    if detector.config.attention != "deformable":
        weights = output.attention[0].weights
        assert weights.shape[2:] == (output.logits[0].shape[1], memory.tokens.shape[1])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        outside = weights * memory.padding[:, None, None]
        assert memory.padding.any() and outside.abs().max() == 0
