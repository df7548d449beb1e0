"""Configs of detectors, part by part.

Torch-free on purpose: a bundle's sidecar carries a config to targets that have no torch.
"""

from __future__ import annotations

from detr.config.backbone import BackboneConfig, NeckConfig, PositionsConfig
from detr.config.base import ClassMap, LayerStack, Positive, Record, Strict, Weight, Word, merged
from detr.config.decoder import (
    ConditionalCrossAttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeformableCrossAttentionConfig,
    DenseCrossAttentionConfig,
    DetachedRefinementConfig,
    DistributionRefinementConfig,
    LookForwardTwiceConfig,
    NoRefinementConfig,
    QualityConfig,
    RefinementConfig,
)
from detr.config.detector import MASK_STRIDE, DetectorConfig, PartName
from detr.config.encoder import (
    AnyEncoderConfig,
    DeformableEncoderConfig,
    DenseEncoderConfig,
    EncoderConfig,
    GelanEncoderConfig,
    HybridEncoderConfig,
)
from detr.config.heads import (
    BoxesConfig,
    ClassesConfig,
    HeadsConfig,
    MasksConfig,
    SigmoidClassesConfig,
    SoftmaxClassesConfig,
)
from detr.config.queries import (
    AnchorQueriesConfig,
    ContrastiveDenoisingConfig,
    LearnedQueriesConfig,
    MixedQueriesConfig,
    OneToManyConfig,
    PlainDenoisingConfig,
    QueriesConfig,
    SelectedQueriesConfig,
    TwoStageQueriesConfig,
    UnifiedDenoisingConfig,
    UnifiedQueriesConfig,
)

__all__ = [
    "MASK_STRIDE",
    "AnchorQueriesConfig",
    "AnyEncoderConfig",
    "BackboneConfig",
    "BoxesConfig",
    "ClassMap",
    "ClassesConfig",
    "ConditionalCrossAttentionConfig",
    "ContrastiveDenoisingConfig",
    "CrossAttentionConfig",
    "DecoderConfig",
    "DeformableCrossAttentionConfig",
    "DeformableEncoderConfig",
    "DenseCrossAttentionConfig",
    "DenseEncoderConfig",
    "DetachedRefinementConfig",
    "DetectorConfig",
    "DistributionRefinementConfig",
    "EncoderConfig",
    "GelanEncoderConfig",
    "HeadsConfig",
    "HybridEncoderConfig",
    "LayerStack",
    "LearnedQueriesConfig",
    "LookForwardTwiceConfig",
    "MasksConfig",
    "MixedQueriesConfig",
    "NeckConfig",
    "NoRefinementConfig",
    "OneToManyConfig",
    "PartName",
    "PlainDenoisingConfig",
    "PositionsConfig",
    "Positive",
    "QualityConfig",
    "QueriesConfig",
    "Record",
    "RefinementConfig",
    "SelectedQueriesConfig",
    "SigmoidClassesConfig",
    "SoftmaxClassesConfig",
    "Strict",
    "TwoStageQueriesConfig",
    "UnifiedDenoisingConfig",
    "UnifiedQueriesConfig",
    "Weight",
    "Word",
    "merged",
]
