"""Backbones: strides, frozen parts, weights from files."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from detr.config import BackboneConfig
from detr.errors import UserError
from detr.models.backbones.timm import Backbone

SMALL = {"channels": (8, 16, 32, 32), "layers": (1, 1, 1, 1)}


def _small(**changes) -> BackboneConfig:
    return BackboneConfig(**{"name": "resnet18", "options": SMALL, **changes})


@pytest.mark.parametrize(
    ("strides", "channels"), [((8, 16, 32), (16, 32, 32)), ((4, 32), (8, 32)), ((16,), (32,))]
)
def test_maps_have_the_strides_asked_for(strides, channels):
    backbone = Backbone(_small(strides=strides)).eval()
    assert backbone.channels == channels
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)
    ]


def test_frozen_norm_keeps_its_statistics_in_training():
    backbone = Backbone(_small(norm="frozen")).train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())
    assert not backbone.body.bn1.weight.requires_grad
    assert backbone.body.conv1.weight.requires_grad


def test_trained_norm_moves_its_statistics():
    backbone = Backbone(_small()).train()
    before = backbone.body.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert not torch.equal(backbone.body.bn1.running_mean, before)
    assert backbone.body.bn1.weight.requires_grad


def test_frozen_stages_are_the_leading_ones():
    backbone = Backbone(_small(frozen_stages=2)).train()
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    before = backbone.body.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(backbone.body.bn1.running_mean, before)


def test_weights_from_a_file_of_the_whole_classifier(tmp_path):
    torch.manual_seed(3)
    classifier = timm.create_model("resnet18", **SMALL)
    save_file(classifier.state_dict(), tmp_path / "r.safetensors")
    backbone = Backbone(_small(pretrained=str(tmp_path / "r.safetensors")))
    torch.testing.assert_close(
        backbone.body.layer2[0].conv1.weight, classifier.layer2[0].conv1.weight
    )
    untouched = Backbone(_small(pretrained="/nowhere.safetensors"), pretrained=False)
    assert not torch.equal(untouched.body.conv1.weight, classifier.conv1.weight)


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        ({"name": "resnet81", "options": {}}, "backbone-unknown", "resnet18"),
        ({"options": {"chanels": 3}}, "backbone-options", "chanels"),
        ({"strides": (8, 64)}, "backbone-strides", "64"),
        ({"frozen_stages": 9}, "backbone-frozen-stages", "9"),
        ({"pretrained": "/nowhere.safetensors"}, "checkpoint-missing", "/nowhere"),
        ({"pretrained": "hub:resnet18.no_such_tag"}, "backbone-download", "no_such_tag"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, code, part):
    with pytest.raises(UserError) as caught:
        Backbone(_small(**changes))
    assert caught.value.code == code
    assert part in caught.value.message
    assert "\n" not in caught.value.message


def test_weights_of_another_backbone_are_refused(tmp_path):
    other = timm.create_model("resnet18", channels=(16, 16, 32, 32), layers=(1, 1, 1, 1))
    save_file(other.state_dict(), tmp_path / "o.safetensors")
    with pytest.raises(UserError) as caught:
        Backbone(_small(pretrained=str(tmp_path / "o.safetensors")))
    assert caught.value.code == "checkpoint-mismatch"
    assert "layer1.0.bn1.bias is [16] instead of [8]" in caught.value.message


def test_padding_does_not_drown_the_gradient_of_the_image():
    """Layer norms of equal channels did: by 1000 per stage of a ConvNeXt from random weights."""
    torch.manual_seed(0)
    options = {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    backbone = Backbone(BackboneConfig(name="convnext_atto", options=options)).train()
    norms = []
    for padded in (False, True):
        image = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
        if padded:
            image[..., 64:] = 0
        backbone.zero_grad()
        sum((x - 1).square().mean() for x in backbone(image)).backward()
        norms.append(torch.stack([p.grad.norm() for p in backbone.parameters()]).norm())
    assert norms[1] < 10 * norms[0]
