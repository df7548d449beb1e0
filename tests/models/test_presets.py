"""Presets: published sizes and costs, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from detr.config import BackboneConfig, DenoisingConfig, DetectorConfig, OneToManyConfig
from detr.errors import UserError
from detr.models import build_detector, parameters
from detr.models.cli import model
from detr.models.describe import describe
from detr.models.presets import FAMILIES, preset, preset_names

# CLoCKDistill, tables on KITTI (7 classes, 402 x 1333): GFLOPs and parameters in millions.
KITTI = {
    "dino-mmdet-r101": (197, 66),
    "dino-mmdet-r50": (155, 47),
    "dino-mmdet-r18": (128, 31),
    "dab-detr-r101": (98, 63),
    "dab-detr-r50": (56, 44),
    "dab-detr-r18": (31, 31),
    "deformable-detr-r101": (148, 59),
    "deformable-detr-r50": (106, 40),
    "deformable-detr-r18": (79, 24),
}
# The same on COCO (80 classes). The paper prints 1064 x 800, but counted on a larger canvas: the
# students and teachers of a detector differ in nothing but ResNet and the neck's first projections,
# whose count no convention changes, and those differences are the published ones at 0.89 to 0.94
# million pixels only (test_coco_differences); 1064 x 800 has 0.85. mmdetection, which the paper
# builds on, counts the mean over a set's first images and prints the size of the last. KITTI's
# images are all of one shape, so there the printed size is the counted one.
COCO = {
    "dino-mmdet-r50": (249, 47),
    "dino-mmdet-r18": (204, 31),
    "dab-detr-r50": (92, 44),
    "dab-detr-r18": (50, 31),
    "deformable-detr-r50": (174, 40),
    "deformable-detr-r18": (129, 24),
}
# OD-DETR on COCO: millions of parameters without and with sharing the decoder's layers (which it
# prints as 406 and 347).
OD_DETR = {"deformable-detr-refine-r50": 40.6, "deformable-detr-shared-r50": 34.7}


C5 = {"levels": 1, "backbone": BackboneConfig(strides=(32,))}


@pytest.mark.parametrize("name", KITTI)
def test_kitti_costs_are_the_published_ones(name):
    gflops, millions = KITTI[name]
    found = describe(preset(name, 7), name, (402, 1333))
    # Published as whole numbers.
    assert found.gflops == pytest.approx(gflops, rel=0.02)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert found.gflops == pytest.approx(sum(p.gflops for p in found.parts.values()))


@pytest.mark.parametrize("name", COCO)
def test_coco_costs_are_the_published_ones(name):
    gflops, millions = COCO[name]
    found = describe(preset(name, 80), name, (800, 1136))
    assert found.gflops == pytest.approx(gflops, rel=0.02)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", OD_DETR)
def test_a_shared_decoder_has_the_published_size(name):
    with torch.device("meta"):
        total = parameters(build_detector(preset(name, 80), pretrained=False))["total"]
    assert total / 1e6 == pytest.approx(OD_DETR[name], rel=0.02)


@pytest.mark.parametrize("family", ["dino-mmdet", "dab-detr", "deformable-detr"])
def test_coco_differences(family):
    """Between R50 and R18, the published numbers rule the printed size out and 800 x 1136 in."""
    published = COCO[f"{family}-r50"][0] - COCO[f"{family}-r18"][0]
    found = {
        size: describe(preset(f"{family}-r50", 80), "", size).gflops
        - describe(preset(f"{family}-r18", 80), "", size).gflops
        for size in ((1064, 800), (800, 1136))
    }
    # Two whole numbers, each rounded by at most a half.
    assert abs(found[800, 1136] - published) <= 1
    assert abs(found[1064, 800] - published) > 1


def test_tokens_are_the_published_ones():
    found = describe(preset("deformable-detr-r18", 80), "x", (800, 1064))
    assert sum(found.tokens) == 17721


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds(family):
    config = preset(f"{family}-r50", 80, pretrained=False)
    assert DetectorConfig.model_validate_json(config.model_dump_json()) == config
    with torch.device("meta"):
        total = parameters(build_detector(config, pretrained=False))["total"]
    assert 3e7 < total < 6e7


def test_an_unknown_name_suggests_its_neighbours():
    with pytest.raises(UserError, match="did you mean dino-r50") as caught:
        preset("dinor50", 80)
    assert caught.value.code == "preset-unknown"
    assert not any("dc5-swin" in name for name in preset_names())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"levels": 5}, "stride-4 map"),
        ({"refine": "detach", "shared_decoder": True}, "heads per layer mean nothing"),
        ({"attention": "dense"}, "works on one map"),
        ({"attention": "conditional", "levels": 1, "query": "mixed"}, "levels 1 is less"),
        ({"memory_fusion": "u", "encoder_layers": 0}, "needs encoder layers"),
        ({"query": "anchors"}, "needs refine"),
        ({"patterns": 3}, "need query: anchors"),
        ({"denoising": DenoisingConfig()}, "needs query: mixed or anchors"),
        (
            {"query": "anchors", "refine": "detach", "denoising": DenoisingConfig()},
            "contrastive belongs to",
        ),
        ({"learned_content": True}, "needs query: two_stage"),
        (
            {"classification": "softmax", "query": "two_stage", "refine": "detach"},
            "softmax has no proposals",
        ),
        (
            {
                "classification": "softmax",
                "query": "anchors",
                "refine": "detach",
                "denoising": DenoisingConfig(contrastive=False),
            },
            "softmax has no proposals or denoising",
        ),
        ({**C5, "attention": "dense", "refine": "detach"}, "needs attention: deformable"),
        (
            {**C5, "attention": "conditional", "query": "mixed", "refine": "detach"},
            "needs attention: deformable .proposals",
        ),
        (
            {**C5, "attention": "dense", "query": "anchors", "refine": "detach"},
            "needs attention: conditional or deformable",
        ),
        (
            {**C5, "attention": "conditional", "shared_decoder": True},
            "a first conditional layer is not",
        ),
        ({"query": "anchors", "refine": "detach", "patterns": 3}, "need attention: conditional"),
        ({"one_to_many": OneToManyConfig()}, "needs query: two_stage"),
        (
            {
                **C5,
                "attention": "conditional",
                "query": "anchors",
                "refine": "detach",
                "patterns": 3,
                "denoising": DenoisingConfig(contrastive=False),
            },
            "denoising needs patterns: 0",
        ),
        ({"width": 260}, "width 260 is not a multiple of heads 8"),
        ({"width": 30, "heads": 2}, "width 30 is not a multiple of 4"),
        ({"backbone": BackboneConfig(strides=(16, 8))}, "finest first"),
        ({"backbone": BackboneConfig(strides=(8, 8))}, "finest first"),
    ],
)
def test_what_cannot_go_together_is_refused(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        DetectorConfig(num_classes=3, **changes)


def test_describe_prints_every_part():
    runner = CliRunner()
    arguments = ["describe", "detr-r18", "--size", "64x96", "--json"]
    result = runner.invoke(model, arguments)
    found = json.loads(result.stdout)
    assert found["tokens"] == [6]
    assert list(found["parts"]) == ["backbone", "neck", "encoder", "source", "decoder"]
    assert found["parts"]["backbone"]["milliseconds"] > 0
    result = runner.invoke(model, ["describe", "detr-r18", "--size", "64x96", "--not-timed"])
    assert "encoder" in result.stdout and "total" in result.stdout
