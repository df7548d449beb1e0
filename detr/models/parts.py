"""The parts of a detector by the names of its tensors: what reports list and recipes freeze."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import get_args

from torch import nn

from detr.config import PartName

PARTS: tuple[PartName, ...] = get_args(PartName)
# What modules are called where it differs.
_NAMES = {"source": "queries", "denoiser": "denoising", "pixels": "heads"}
_HEADS = re.compile(r"decoder\.(?:class_heads|box_heads|mask_heads|refiner)\.")
# Tensors with a row per class, and perhaps some more rows after them.
CLASS_HEADS = re.compile(
    r"(?:decoder\.class_heads\.\d+|source\.(?:further\.\d+\.)?proposals\.class_head)\."
)
BOX_HEADS = re.compile(
    r"(?:decoder\.box_heads\.\d+|decoder\.refiner|source\.(?:further\.\d+\.)?proposals\.box_head)\."
)
LABELS = "denoiser.label_embedding.weight"


def part_of(name: str) -> str:
    """The part of a detector that a tensor belongs to."""
    if _HEADS.match(name):
        return "heads"
    module = name.partition(".")[0]
    return _NAMES.get(module, module)


def by_part(names: Iterable[str]) -> dict[str, int]:
    """How many of the tensors are in each part, in the order of the network."""
    counts = Counter(part_of(name) for name in names)
    order = [*PARTS, *sorted(counts.keys() - set(PARTS))]
    return {part: counts[part] for part in order if counts[part]}


def modules_of(detector: nn.Module, parts: Iterable[str]) -> list[nn.Module]:
    """All modules, at every depth, that belong to some parts."""
    wanted = set(parts)
    return [m for name, m in detector.named_modules() if name and part_of(f"{name}.") in wanted]
