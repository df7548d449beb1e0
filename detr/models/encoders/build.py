"""Which encoder a config asks for; a further kind is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detr.config import (
    DeformableEncoderConfig,
    DenseEncoderConfig,
    DetectorConfig,
    GelanEncoderConfig,
    HybridEncoderConfig,
    LiteEncoderConfig,
)
from detr.models.encoders.base import Encoder
from detr.models.encoders.hybrid import GelanEncoder, HybridEncoder, LiteEncoder
from detr.models.encoders.tokens import DeformableEncoder, DenseEncoder

_ENCODERS: dict[type, Callable[[DetectorConfig, Any], Encoder]] = {
    DeformableEncoderConfig: DeformableEncoder,
    DenseEncoderConfig: DenseEncoder,
    HybridEncoderConfig: HybridEncoder,
    GelanEncoderConfig: GelanEncoder,
    LiteEncoderConfig: LiteEncoder,
}


def build_encoder(config: DetectorConfig) -> Encoder:
    """A new encoder of a detector."""
    return _ENCODERS[type(config.encoder)](config, config.encoder)
