"""What a detector weighs."""

from __future__ import annotations

from detr.models.detector import Detector


def parameters(detector: Detector) -> dict[str, int]:
    """Number of parameters (trained or frozen) of each part, and their ``total``."""
    parts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in detector.named_children()
    }
    return {**parts, "total": sum(parts.values())}
