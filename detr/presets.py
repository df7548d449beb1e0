"""The field's detectors by name: ``FAMILY-BACKBONE``, such as ``dino-r50`` or ``detr-dc5-r18``.

Constants are those of the original repositories; where code bases differ, the family says whose.
"""

from __future__ import annotations

import difflib
from typing import Any

from detr.config import (
    AnchorQueriesConfig,
    BackboneConfig,
    BoxesConfig,
    ConditionalCrossAttentionConfig,
    ContrastiveDenoisingConfig,
    DecoderConfig,
    DeformableCrossAttentionConfig,
    DeformableEncoderConfig,
    DenseCrossAttentionConfig,
    DenseEncoderConfig,
    DetachedRefinementConfig,
    DetectorConfig,
    DistributionRefinementConfig,
    GelanEncoderConfig,
    GroupedQueriesConfig,
    HeadsConfig,
    HybridEncoderConfig,
    LearnedQueriesConfig,
    LookForwardTwiceConfig,
    MasksConfig,
    MixedQueriesConfig,
    NeckConfig,
    OneToManyConfig,
    PlainDenoisingConfig,
    PositionsConfig,
    ScaledBoxesConfig,
    SelectedQueriesConfig,
    SigmoidClassesConfig,
    SoftmaxClassesConfig,
    TwoStageQueriesConfig,
    UnifiedDenoisingConfig,
    UnifiedQueriesConfig,
)
from detr.errors import UserError
from detr.real_time_sizes import (
    D_FINE_SIZES,
    DEIMV2_SIZES,
    HGNET,
    RT_DETR_SIZES,
    SMALL_HGNET,
    TRAINED,
)
from detr.vit_sizes import DEIMV2_VIT_SIZES, LW_DETR_SIZES, RF_DETR_SIZES

# Short name to timm model and the tag of its ImageNet weights.
BACKBONES: dict[str, tuple[str, str | None]] = {
    "r18": ("resnet18", "hub:resnet18.tv_in1k"),
    "r34": ("resnet34", "hub:resnet34.tv_in1k"),
    "r50": ("resnet50", "hub:resnet50.tv_in1k"),
    "r101": ("resnet101", "hub:resnet101.tv_in1k"),
    "swin-t": (
        "swin_tiny_patch4_window7_224",
        "hub:swin_tiny_patch4_window7_224.ms_in1k",
    ),
    "swin-s": (
        "swin_small_patch4_window7_224",
        "hub:swin_small_patch4_window7_224.ms_in1k",
    ),
    "swin-b": (
        "swin_base_patch4_window12_384",
        "hub:swin_base_patch4_window12_384.ms_in22k",
    ),
    "swin-l": (
        "swin_large_patch4_window12_384",
        "hub:swin_large_patch4_window12_384.ms_in22k",
    ),
}

# ResNets whose stem is three small convolutions and whose shortcuts average before they narrow.
_VD: dict[str, tuple[str, str | None]] = {
    "r18": ("resnet18d", "hub:resnet18d.ra2_in1k"),
    "r34": ("resnet34d", "hub:resnet34d.ra2_in1k"),
    "r50": ("resnet50d", "hub:resnet50d.ra2_in1k"),
    "r101": ("resnet101d", "hub:resnet101d.ra2_in1k"),
}

_ON_EDGES = HeadsConfig(boxes=BoxesConfig(logit_eps=1e-3))
_DC5 = BackboneConfig(strides=(16,), options={"output_stride": 16})

_DETR = DetectorConfig(
    num_classes=1,
    dropout=0.1,
    backbone=BackboneConfig(strides=(32,)),
    neck=NeckConfig(levels=1, group_norm=False),
    positions=PositionsConfig(offset=0.0),
    encoder=DenseEncoderConfig(ffn=2048),
    queries=LearnedQueriesConfig(number=100, reference="center", learned_content=False),
    decoder=DecoderConfig(ffn=2048, cross_attention=DenseCrossAttentionConfig(), final_norm=True),
    heads=HeadsConfig(classes=SoftmaxClassesConfig()),
)
_CONDITIONAL = _DETR.replace(
    queries=LearnedQueriesConfig(reference="mlp", learned_content=False),
    decoder={"cross_attention": ConditionalCrossAttentionConfig()},
    heads={"classes": SigmoidClassesConfig()},
)
_DAB = _CONDITIONAL.replace(
    dropout=0.0,
    positions={"temperature": 20.0},
    encoder={"activation": "prelu", "scaled_positions": True},
    queries=AnchorQueriesConfig(learned_content=False),
    decoder={"activation": "prelu", "refinement": LookForwardTwiceConfig(shared_heads=True)},
    heads=_ON_EDGES,
    detections=300,
)
_DN = PlainDenoisingConfig()

_DEFORMABLE = DetectorConfig(num_classes=1, dropout=0.1)
_REFINED = _DEFORMABLE.replace(decoder={"refinement": DetachedRefinementConfig()})
_TWO_STAGE = _REFINED.replace(queries=TwoStageQueriesConfig(proposal_tokens="all"))
_DAB_DEFORMABLE = DetectorConfig(
    num_classes=1,
    encoder=DeformableEncoderConfig(ffn=2048),
    queries=AnchorQueriesConfig(),
    decoder=DecoderConfig(
        ffn=2048,
        cross_attention=DeformableCrossAttentionConfig(scaled_positions=True),
        refinement=DetachedRefinementConfig(),
    ),
    heads=_ON_EDGES,
    detections=300,
)
_H_DEFORMABLE = DetectorConfig(
    num_classes=1,
    encoder=DeformableEncoderConfig(ffn=2048),
    queries=TwoStageQueriesConfig(
        proposal_tokens="all", learned_content=True, one_to_many=OneToManyConfig()
    ),
    decoder=DecoderConfig(ffn=2048, refinement=LookForwardTwiceConfig()),
)
_DINO = DetectorConfig(
    num_classes=1,
    encoder=DeformableEncoderConfig(ffn=2048),
    queries=MixedQueriesConfig(
        number=900, proposal_tokens="all", denoising=ContrastiveDenoisingConfig()
    ),
    decoder=DecoderConfig(ffn=2048, refinement=LookForwardTwiceConfig(), final_norm=True),
    heads=_ON_EDGES,
    detections=300,
)
_OFFICIAL_DINO = _DINO.replace(
    positions=PositionsConfig(temperature=20.0, offset=0.0),
    decoder={"refinement": {"shared_heads": True}},
)
_STABLE_DINO = _DINO.replace(encoder={"fusion": "dense"})
# IDEA-Research/MaskDINO with FEATURE_ORDER low2high and a fourth level, its main models.
_MASK_DINO = DetectorConfig(
    num_classes=1,
    positions=PositionsConfig(offset=0.0),
    encoder=DeformableEncoderConfig(ffn=2048),
    queries=UnifiedQueriesConfig(
        proposal_tokens="all",
        initial_boxes="mask2box",
        coarse_to_fine=True,
        denoising=UnifiedDenoisingConfig(),
    ),
    decoder=DecoderConfig(
        layers=9,
        ffn=2048,
        refinement=LookForwardTwiceConfig(shared_heads=True),
        final_norm=True,
        norm_twice=True,
    ),
    heads=HeadsConfig(masks=MasksConfig(weigh_scores=True)),
)
# RT-DETR-R50; RT_DETR_SIZES has the others.
_RT_DETR = DetectorConfig(
    num_classes=1,
    neck=NeckConfig(levels=3, group_norm=False, batch_norm=True),
    positions=PositionsConfig(offset=-1.0, normalized=False),
    encoder=HybridEncoderConfig(),
    queries=SelectedQueriesConfig(proposal_tokens="all", denoising=ContrastiveDenoisingConfig()),
    decoder=DecoderConfig(refinement=LookForwardTwiceConfig()),
    detections=300,
)
# D-FINE-L; D_FINE_SIZES has the others.
_D_FINE = _RT_DETR.replace(
    encoder=GelanEncoderConfig(),
    queries={"position_limit": 10.0},
    decoder=DecoderConfig(
        cross_attention=DeformableCrossAttentionConfig(points=(3, 6, 3), projections=False),
        refinement=DistributionRefinementConfig(),
        gated=True,
    ),
)
# LW-DETR's decoder; the backbones and necks of its sizes are in _LW_DETR_SIZES.
_LW_DETR = DetectorConfig(
    num_classes=1,
    neck=NeckConfig(levels=3),
    encoder=DeformableEncoderConfig(layers=0),
    queries=GroupedQueriesConfig(),
    decoder=DecoderConfig(
        layers=3,
        ffn=2048,
        cross_attention=DeformableCrossAttentionConfig(points=2, heads=16),
        final_norm=True,
    ),
    heads=HeadsConfig(boxes=ScaledBoxesConfig()),
    detections=300,
)


# DEIM's decoders and heads, on both.
_SILU: dict[str, Any] = {"mlp_activation": "silu", "decoder": {"activation": "silu"}}
# DEIMv2 as its code has it over large HGNetv2s, of which there are no weights; DEIMV2_SIZES has
# those that are published.
_DEIMV2 = _D_FINE.replace(
    mlp_activation="silu",
    encoder={"join": "sum", "smooth": False},
    queries={"position_layers": 3, "positions_stay": True, "projected": False},
    decoder={"activation": "swiglu", "norm": "rms"},
)


def _five_scales(config: DetectorConfig) -> DetectorConfig:
    """The same from the map of stride 4 on."""
    return config.replace(backbone={"strides": (4, 8, 16, 32)}, neck={"levels": 5})


# Each family's detector but for its classes and its backbone's name and weights.
FAMILIES: dict[str, DetectorConfig] = {
    "detr": _DETR,
    "detr-dc5": _DETR.replace(backbone=_DC5),
    "conditional-detr": _CONDITIONAL,
    "conditional-detr-dc5": _CONDITIONAL.replace(backbone=_DC5),
    "dab-detr": _DAB,
    "dab-detr-dc5": _DAB.replace(backbone=_DC5),
    "dab-detr-patterns": _DAB.replace(queries={"patterns": 3}),
    "dn-dab-detr": _DAB.replace(queries={"denoising": _DN}),
    "deformable-detr": _DEFORMABLE,
    "deformable-detr-refine": _REFINED,
    "deformable-detr-two-stage": _TWO_STAGE,
    "deformable-detr-shared": _REFINED.replace(
        decoder={"refinement": {"shared_heads": True}, "shared_layers": True}
    ),
    "dab-deformable-detr": _DAB_DEFORMABLE,
    "dn-deformable-detr": _DAB_DEFORMABLE.replace(queries={"denoising": _DN}),
    "h-deformable-detr": _H_DEFORMABLE,
    # detrex and Stable-DINO: heads per layer, Deformable DETR's image positions.
    "dino": _DINO,
    "dino-5scale": _five_scales(_DINO),
    # IDEA-Research/DINO: shared heads. mmdet: its positions, but heads per layer.
    "dino-official": _OFFICIAL_DINO,
    "dino-official-5scale": _five_scales(_OFFICIAL_DINO),
    "dino-mmdet": _OFFICIAL_DINO.replace(decoder={"refinement": {"shared_heads": False}}),
    "stable-dino": _STABLE_DINO,
    "stable-dino-5scale": _five_scales(_STABLE_DINO),
    # IDEA-Research/MaskDINO: instance masks beside boxes.
    "mask-dino": _MASK_DINO,
    "stable-mask-dino": _MASK_DINO.replace(encoder={"fusion": "dense"}),
    # lyuwenyu/RT-DETR, over ResNet-vd.
    "rtdetr": _RT_DETR,
    # Version 2 is the same network, trained otherwise, or one that samples whole cells.
    "rtdetrv2": _RT_DETR,
    "rtdetrv2-discrete": _RT_DETR.replace(decoder={"cross_attention": {"discrete": True}}),
    # Peterande/D-FINE, over HGNetv2.
    "d-fine": _D_FINE,
    # Atten4Vis/LW-DETR, over plain ViTs.
    "lwdetr": _LW_DETR,
    # ShihuaHuang95/DEIM, which trains all of the backbones.
    "deim-d-fine": _D_FINE.replace(**_SILU),
    "deim-rtdetrv2": _RT_DETR.replace(**_SILU, queries={"position_layers": 3}),
    # Intellindust-AI-Lab/DEIMv2, over HGNetv2 and other backbones.
    "deimv2": _DEIMV2,
    # roboflow/rf-detr: the same decoder over DINOv2.
    "rfdetr": _LW_DETR,
}
_D_FINES = {"d-fine", "deim-d-fine"}
_OVER_HGNET = {*_D_FINES, "deimv2"}
_RT_DETRS = {"rtdetr", "rtdetrv2", "rtdetrv2-discrete", "deim-rtdetrv2"}
# Families of detrex, which freezes a ResNet's stem; the others' code freezes its first stage, too.
_STEM_ONLY = {"dino", "dino-5scale", "stable-dino", "stable-dino-5scale"} | _RT_DETRS | _OVER_HGNET
# Families whose code trains all of a ResNet.
_NOTHING_FROZEN = {"mask-dino", "stable-mask-dino"}
# Families over other ResNets than torchvision's, or over further backbones.
_RESNETS: dict[str, dict[str, tuple[str, str | None]]] = {
    **{family: _VD for family in _RT_DETRS},
    **{family: {**_VD, **HGNET} for family in _D_FINES},
    "deimv2": {**_VD, **SMALL_HGNET},
}
# Sizes whose backbone is their own, so that none of the others' takes its place.
_WHOLE_SIZES = {"lwdetr": LW_DETR_SIZES, "rfdetr": RF_DETR_SIZES, "deimv2": DEIMV2_VIT_SIZES}
_SIZES = {
    **dict.fromkeys(_RT_DETRS, RT_DETR_SIZES),
    **dict.fromkeys(_D_FINES, D_FINE_SIZES),
    "deimv2": DEIMV2_SIZES,
}
# Families whose code trains the whole backbone, norms included.
_ALL_TRAINED = {"deim-d-fine", "deim-rtdetrv2", "deimv2"}


def _shorts(family: str) -> list[str]:
    """What a family's presets are called after its name."""
    return [*_backbones(family), *_WHOLE_SIZES.get(family, {})]


def _backbones(family: str) -> dict[str, tuple[str, str | None]]:
    """Short names of the backbones of a family."""
    return {**BACKBONES, **_RESNETS.get(family, {})}


# Backbones' names have dashes, too.
_NAMES = {
    f"{family}-{short}": (family, short)
    for family in FAMILIES
    for short in _shorts(family)
    if not ("dc5" in family and short.startswith("swin"))
}


def preset_names() -> list[str]:
    """Every name :func:`preset` knows."""
    return sorted(_NAMES)


def preset(name: str, num_classes: int, pretrained: bool = True) -> DetectorConfig:
    """The config of a published detector.

    Args:
        name: ``FAMILY-BACKBONE``.
        num_classes: K.
        pretrained: Name the backbone's ImageNet weights and freeze its batch norms and, of a
            ResNet, the stages that the family's code freezes; otherwise it starts from random
            weights and trains all. Vision transformers have no weights of their own to name.

    Raises:
        UserError: ``preset-unknown`` with the nearest names.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(name, preset_names(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError("preset-unknown", f"no detector is called {name!r}{hint}")
    family, short = _NAMES[name]
    if short in _WHOLE_SIZES.get(family, {}):
        sized = FAMILIES[family].replace(num_classes=num_classes)
        return sized.replace(**_WHOLE_SIZES[family][short])
    timm_name, weights = _backbones(family)[short]
    frozen = 1 + (family not in _STEM_ONLY)
    if short not in _VD or not pretrained or family in _NOTHING_FROZEN:
        frozen = 0
    config = FAMILIES[family].replace(
        num_classes=num_classes,
        backbone={
            "name": timm_name,
            "norm": "frozen" if pretrained else "train",
            "pretrained": weights if pretrained else None,
            "map_norm": short.startswith("swin"),
            "frozen_stages": frozen,
        },
    )
    config = config.replace(**_SIZES.get(family, {}).get(short, {}))
    return config.replace(backbone=TRAINED) if family in _ALL_TRAINED else config
