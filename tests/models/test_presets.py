"""Presets: published sizes and costs, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from detr.config import (
    AnchorQueriesConfig,
    ConditionalCrossAttentionConfig,
    ContrastiveDenoisingConfig,
    DenseCrossAttentionConfig,
    DenseEncoderConfig,
    DetachedRefinementConfig,
    DetectorConfig,
    Dinov3BackboneConfig,
    GroupedQueriesConfig,
    HybridEncoderConfig,
    LearnedQueriesConfig,
    MasksConfig,
    MixedQueriesConfig,
    PlainDenoisingConfig,
    ProjectorNeckConfig,
    SoftmaxClassesConfig,
    TwoStageQueriesConfig,
    VitBackboneConfig,
)
from detr.errors import UserError
from detr.models import build_detector, parameters
from detr.models.cli import model
from detr.models.convolutions import ConvNormOfTwo
from detr.models.describe import describe
from detr.presets import FAMILIES, preset, preset_names
from detr.problems import problem_line

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
# D-FINE's and RT-DETR's repositories, on COCO at 640 x 640.
D_FINE = {
    "d-fine-n": (7, 4),
    "d-fine-s": (25, 10),
    "d-fine-m": (57, 19),
    "d-fine-l": (91, 31),
    "d-fine-x": (202, 62),
}
# DEIMv2's repository: side of the canvas, GFLOPs (of two operations each), parameters in millions.
DEIMV2 = {
    "deimv2-atto": (320, 0.8, 0.5),
    "deimv2-femto": (416, 1.7, 1.0),
    "deimv2-pico": (640, 5.2, 1.5),
    "deimv2-n": (640, 6.8, 3.6),
    # Without the products of the transformer's attention, which its counter leaves out.
    "deimv2-s": (640, 25.6, 9.7),
    "deimv2-m": (640, 52.2, 18.1),
    "deimv2-l": (640, 96.7, 32.2),
    "deimv2-x": (640, 151.6, 50.3),
}
RT_DETR = {
    "rtdetr-r18": (60, 20),
    "rtdetr-r34": (92, 31),
    "rtdetr-r50": (136, 42),
    "rtdetr-r101": (259, 76),
}
# LW-DETR's and RF-DETR's repositories, with the groups of training and outputs for COCO's 91 ids.
VITS = {
    "lwdetr-tiny": 12.1,
    "lwdetr-small": 14.6,
    "lwdetr-medium": 28.2,
    "lwdetr-large": 46.8,
    "lwdetr-xlarge": 118.0,
    "rfdetr-nano": 30.5,
    "rfdetr-small": 32.1,
    "rfdetr-medium": 33.7,
    "rfdetr-large": 33.9,
}
# OD-DETR on COCO: millions of parameters without and with sharing the decoder's layers (which it
# prints as 406 and 347).
OD_DETR = {"deformable-detr-refine-r50": 40.6, "deformable-detr-shared-r50": 34.7}


VIT = VitBackboneConfig(taps=(2, 4, 6))
C5 = {"neck.levels": 1, "backbone.strides": (32,), "encoder": DenseEncoderConfig()}
CENTER = LearnedQueriesConfig(reference="center", learned_content=False)
MOVED = {"decoder.refinement": DetachedRefinementConfig()}
CONDITIONAL = {"decoder.cross_attention": ConditionalCrossAttentionConfig()}
DENSE = {"decoder.cross_attention": DenseCrossAttentionConfig()}
SOFTMAX = {"heads.classes": SoftmaxClassesConfig()}


@pytest.mark.slow
@pytest.mark.parametrize("name", KITTI)
def test_kitti_costs_are_the_published_ones(name):
    gflops, millions = KITTI[name]
    found = describe(preset(name, 7), name, (402, 1333))
    # Published as whole numbers.
    assert found.gflops == pytest.approx(gflops, rel=0.02)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert found.gflops == pytest.approx(sum(p.gflops for p in found.parts.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", COCO)
def test_coco_costs_are_the_published_ones(name):
    gflops, millions = COCO[name]
    found = describe(preset(name, 80), name, (800, 1136))
    assert found.gflops == pytest.approx(gflops, rel=0.02)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", RT_DETR | D_FINE)
def test_real_time_costs_are_the_published_ones(name):
    gflops, millions = (RT_DETR | D_FINE)[name]
    found = describe(preset(name, 80), name, (640, 640))
    # Published as whole numbers, and a multiply-add as two operations; D-FINE's after RepVGG blocks
    # were joined. Published 1x1 convolutions see a coarser map after it is enlarged to four times
    # the cells, ours before.
    config = preset(name, 80)
    with torch.device("meta"):
        steps = build_detector(config, pretrained=False).encoder.top_down
    saved = 0.0
    for step, stride in zip(steps, reversed(config.backbone.strides[:-1]), strict=True):
        for block in (x for x in step.modules() if isinstance(x, ConvNormOfTwo)):
            coarse, outputs = block.conv.in_channels // 2, block.conv.out_channels
            saved += 0.75 * coarse * outputs * (640 // stride) ** 2 / 1e9
    joined = 0.03 if name in D_FINE else 0.02
    assert saved > 0
    assert 2 * (found.gflops + saved) == pytest.approx(gflops, rel=joined, abs=0.5)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEIMV2)
def test_deimv2s_costs_are_the_published_ones(name):
    side, gflops, millions = DEIMV2[name]
    config = preset(name, 80)
    found = describe(config, name, (side, side))
    products = 0.0
    if isinstance(config.backbone, Dinov3BackboneConfig):
        tokens = (side // 16) ** 2 + 1 + config.backbone.registers
        products = 4 * config.backbone.depth * config.backbone.width * tokens**2 / 1e9
    assert 2 * found.gflops - products == pytest.approx(gflops, rel=0.04, abs=0.05)
    # The repository counts after RepVGG blocks were joined.
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02, abs=0.05)


@pytest.mark.parametrize("name", VITS)
def test_vision_transformers_have_the_published_sizes(name):
    with torch.device("meta"):
        total = parameters(build_detector(preset(name, 91), pretrained=False))["total"]
    assert total / 1e6 == pytest.approx(VITS[name], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", OD_DETR)
def test_a_shared_decoder_has_the_published_size(name):
    with torch.device("meta"):
        total = parameters(build_detector(preset(name, 80), pretrained=False))["total"]
    assert total / 1e6 == pytest.approx(OD_DETR[name], rel=0.02)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds(family):
    config = preset(f"{family}-r50", 80, pretrained=False)
    assert DetectorConfig.model_validate_json(config.model_dump_json()) == config
    with torch.device("meta"):
        total = parameters(build_detector(config, pretrained=False))["total"]
    assert 3e7 < total < 6e7


def test_an_unknown_name_suggests_its_neighbors():
    with pytest.raises(UserError, match="did you mean dino-r50") as caught:
        preset("dinor50", 80)
    assert caught.value.code == "preset-unknown"
    assert not any("dc5-swin" in name for name in preset_names())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"neck.levels": 5}, "stride-4 map"),
        ({"neck.levels": 2}, "levels 2 is less than the backbone's maps 3"),
        ({**MOVED, "decoder.shared_layers": True}, "heads per layer mean nothing"),
        ({"encoder": DenseEncoderConfig()}, "encoder: dense works on one map"),
        (DENSE, "decoder.cross_attention: dense works on one map"),
        ({"encoder": {"fusion": "u", "layers": 0}}, "needs encoder layers"),
        (
            {"queries": AnchorQueriesConfig()},
            "anchors start from boxes and need decoder.refinement",
        ),
        ({**MOVED, **SOFTMAX, "queries": TwoStageQueriesConfig()}, "softmax has no proposals"),
        (
            {**MOVED, **SOFTMAX, "queries": AnchorQueriesConfig(denoising=PlainDenoisingConfig())},
            "softmax has no proposals or denoising",
        ),
        ({**C5, **CONDITIONAL, **MOVED}, "detach needs decoder.cross_attention: deformable"),
        ({**C5, **CONDITIONAL, "queries": CENTER}, "conditional looks at places, and queries that"),
        ({**C5, **DENSE, **MOVED, "queries": AnchorQueriesConfig()}, "dense never looks"),
        ({**C5, **MOVED, "queries": MixedQueriesConfig()}, "mixed come from proposals per level"),
        (
            {**C5, **CONDITIONAL, "decoder.shared_layers": True},
            "the first one of cross_attention: conditional is not",
        ),
        ({"queries": {"kind": "anchors", "patterns": 3}}, "take the place of content"),
        (
            {
                "queries": {
                    "kind": "anchors",
                    "learned_content": False,
                    "patterns": 3,
                    "denoising": {"groups": 5},
                }
            },
            "denoising needs patterns: 0",
        ),
        ({"encoder.points": 2}, "encoder.points 2 and decoder.cross_attention.points 4 differ"),
        (
            {"encoder.points": [1, 2, 3, 4], "decoder.cross_attention.points": [4, 3, 2, 1]},
            r"encoder.points \[1, 2, 3, 4\] and decoder.cross_attention.points \[4, 3, 2, 1\] diff",
        ),
        (
            {"encoder.points": [3, 6], "decoder.cross_attention.points": [3, 6]},
            r"encoder.points: \[3, 6\] are of 2 levels, not 4",
        ),
        ({"decoder.evaluated_layers": 7}, "evaluated_layers 7 of 6 layers"),
        (
            {"decoder.refinement": {"kind": "distribution", "bins": 7}},
            "bins: Input should be a multiple of 2|multiple of 2",
        ),
        (
            {"decoder.refinement": {"kind": "distribution", "bins": 4, "quality": {"top": 6}}},
            "quality.top 6 of the 5 places",
        ),
        ({"backbone": VIT}, "the backbone's 3 have one stride: set neck.kind to projector"),
        ({"neck": ProjectorNeckConfig()}, "projector joins maps of one stride, not of 8, 16, 32"),
        (
            {"backbone": VIT, "neck": ProjectorNeckConfig(), "heads.masks": MasksConfig()},
            "a backbone of kind vit has no map of stride 4",
        ),
        (
            {
                "backbone": VIT,
                "neck": ProjectorNeckConfig(scales=(2.0, 0.5)),
                "encoder": HybridEncoderConfig(),
            },
            "hybrid needs levels that are half as fine each, not of strides 8, 32",
        ),
        ({"neck": {"kind": "projector", "scales": [0.5, 2]}}, "name each once, finest first"),
        ({"neck": {"kind": "projector", "scales": [3]}}, "3.0 is none of 2, 1 and 0.5"),
        ({"backbone": {"kind": "vit", "windowed": [12]}}, "there are blocks 0 to 11"),
        ({"backbone": {"kind": "vit", "width": 100}}, "width 100 is not a multiple of heads 12"),
        (
            {"decoder.cross_attention.heads": 16},
            "heads 16 and the encoder's 8 differ: an exported graph",
        ),
        (
            {"encoder.layers": 0, "decoder.cross_attention.heads": 3},
            "width 256 is not a multiple of decoder.cross_attention.heads 3",
        ),
        (
            {**MOVED, "queries": GroupedQueriesConfig(), "heads.masks": MasksConfig()},
            "grouped have several groups, and heads.masks has a loss for one",
        ),
        (
            {"decoder.refinement.kind": "distribution", "heads.boxes.kind": "scaled"},
            "distribution needs heads.boxes: offset",
        ),
        ({"width": 260}, "width 260 is not a multiple of attention_heads 8"),
        ({"width": 30, "attention_heads": 2}, "width 30 is not a multiple of 4"),
        ({"backbone.strides": (16, 8)}, "finest first"),
        ({"backbone.strides": (8, 8)}, "finest first"),
    ],
)
def test_what_cannot_go_together_is_refused(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        DetectorConfig(num_classes=3).replace(**changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"queries": {"kind": "learned", "denoising": None}},
            "queries.denoising: no such key; kind: learned has none, anchors, mixed, "
            "selected and unified have",
        ),
        (
            {"decoder.refinement.shared_heads": True},
            "decoder.refinement.shared_heads: no such key; kind: none has none, detach and "
            "look_forward_twice have",
        ),
        ({"encoder": {"kind": "dense", "points": 4}}, "encoder.points: no such key; kind: dense"),
        ({"heads.classes": {"kind": "softmx"}}, "heads.classes.kind: no such kind 'softmx'; did"),
        ({"queries": {"kind": 3}}, "queries.kind: no such kind '3'; there are learned, anchors"),
        ({"queries": 300}, "queries: expected a mapping with a kind: learned, anchors, two_stage"),
        ({"encoder.points": 0}, "encoder.points: 0 is no whole number from 1 to 64"),
        ({"encoder.points": [3, 65]}, "encoder.points: 65 is no whole number from 1 to 64"),
        ({"encoder.points": [True, 3]}, "encoder.points: True is no whole number from 1 to 64"),
        ({"encoder.points": []}, "encoder.points: no number of points"),
        ({"queries.number": 0}, "queries.number: Input should be greater than or equal to 1"),
        ({"neck": 4}, "neck: expected a mapping with a kind: levels, projector"),
        (
            {"backbone": {"kind": "vit", "name": "x"}},
            "backbone.name: no such key; kind: vit has none, timm have",
        ),
        ({"neck": {"kind": "fpn"}}, "neck.kind: no such kind 'fpn'; there are levels, projector"),
    ],
)
def test_mistakes_within_a_kind_are_told_in_one_line(changes, line):
    with pytest.raises(ValidationError) as caught:
        DetectorConfig(num_classes=3).replace(**changes)
    found = problem_line(caught.value, DetectorConfig)
    assert found.startswith(line)
    assert "\n" not in found


def test_replace_changes_what_it_names():
    config = preset("dino-r18", 7)
    changed = config.replace(
        **{"encoder.layers": 3}, queries={"denoising": {"number": 5}}, decoder={"layers": 2}
    )
    assert (changed.encoder.layers, changed.decoder.layers) == (3, 2)
    assert changed.queries.denoising == ContrastiveDenoisingConfig(number=5)
    assert changed.queries.number == config.queries.number
    assert (
        changed.replace(encoder={"layers": 6}, decoder={"layers": 6}).replace(
            **{"queries.denoising.number": 100}
        )
        == config
    )
    # Another kind has its own options and none of the last one's.
    assert config.replace(queries={"kind": "two_stage"}).queries == TwoStageQueriesConfig()


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
