"""Imports of Hugging Face folders: ``config.json`` beside ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from detr.config import ContrastiveDenoisingConfig, DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.detector import build_detector
from detr.models.tensors import match_tensors, read_tensors
from detr.models.weights import conditional_detr, dab_detr, deformable_detr, detr, rt_detr
from detr.models.weights.backbones import plain_rules, transformers_resnet_rules
from detr.models.weights.imported import USUAL_INPUT, Imported
from detr.models.weights.renaming import Rule, rename

_LABELS = "denoiser.label_embedding.weight"


class Family(NamedTuple):
    """How one published architecture is read.

    Attributes:
        config_of: ``config.json``, number of classes and place to our config.
        rules: Where its tensors go, the backbone's aside.
        backbone: Regular expression of what precedes the backbone's tensor names; ``None`` where
            the rules know the backbone.
        preprocess: What its images went through in training.
    """

    config_of: Callable[[Mapping[str, Any], int, str], DetectorConfig]
    rules: Callable[[DetectorConfig], tuple[Rule, ...]]
    backbone: str | None
    preprocess: PreprocessConfig = USUAL_INPUT


FAMILIES = {
    "detr": Family(detr.config_of, detr.rules, detr.BACKBONE),
    "conditional_detr": Family(conditional_detr.config_of, conditional_detr.rules, detr.BACKBONE),
    "dab_detr": Family(dab_detr.config_of, dab_detr.rules, dab_detr.BACKBONE),
    "deformable_detr": Family(
        deformable_detr.config_of, deformable_detr.rules, deformable_detr.BACKBONE
    ),
    "rt_detr": Family(rt_detr.config_of, rt_detr.rules, None, rt_detr.INPUT),
    "rt_detr_v2": Family(rt_detr.config_of, rt_detr.rules, None, rt_detr.INPUT),
}


def read_folder(folder: Path) -> Imported:
    """The detector in a Hugging Face folder.

    Raises:
        UserError: ``weights-source`` where the folder is not one, ``weights-family`` for a model
            type we have no architecture for, and what :func:`convert` raises.
    """
    path = folder / "config.json"
    try:
        published = json.loads(path.read_text())
    except OSError as error:
        raise UserError("weights-source", f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError("weights-source", f"{path}: not JSON: {error}") from error
    if not isinstance(published, dict):
        raise UserError("weights-source", f"{path}: not a model's config")
    tensors: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError("weights-source", f"{folder}: no model.safetensors")
    for file in files:
        tensors |= read_tensors(file)
    return convert(published, tensors, str(folder))


def convert(published: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str) -> Imported:
    """Our detector of a published config and state dict.

    Args:
        published: Content of ``config.json``.
        tensors: The state dict.
        place: The source, for messages.

    Raises:
        UserError: ``weights-family``, ``weights-backbone``, ``weights-unknown-tensor``,
            ``weights-copies-differ``, or ``checkpoint-mismatch`` naming tensors left unfilled.
    """
    kind = str(published.get("model_type")).replace("-", "_")
    if kind not in FAMILIES:
        raise UserError(
            "weights-family", f"{place}: model type {kind!r} is none of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    names = class_names(published)
    config = family.config_of(published, len(names), place)
    table = family.rules(config)
    if family.backbone is not None:
        table = (*table, *_backbone_rules(published, family.backbone))
    renamed = rename(tensors, table, place)
    surplus = drop_label_rows(renamed.tensors, config)
    detector = build_detector(config, pretrained=False)
    match_tensors(detector, renamed.tensors, place)
    unused = renamed.unused | surplus
    return Imported(detector.eval(), names, unused, family.preprocess)


def drop_label_rows(tensors: dict[str, Tensor], config: DetectorConfig) -> dict[str, str]:
    """Cuts rows that no label ever reads off a published label embedding, in place.

    DINO's has one for each of COCO's ids, RT-DETR's one for padding.

    Args:
        tensors: Under our names.
        config: The detector.

    Returns:
        What was cut, with the reason.
    """
    count, found = config.num_classes, tensors.get(_LABELS)
    noise = config.queries.noise
    if found is None or not isinstance(noise, ContrastiveDenoisingConfig) or len(found) <= count:
        return {}
    tensors[_LABELS] = found[:count]
    return {f"{_LABELS}[{count}:]": "rows that no label ever reads"}


def _backbone_rules(published: Mapping[str, Any], prefix: str) -> tuple[Rule, ...]:
    """Where a backbone's tensors go."""
    inner = published.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        bottleneck = inner.get("layer_type", "bottleneck") == "bottleneck"
        return transformers_resnet_rules(prefix, bottleneck)
    return plain_rules(prefix)


def class_names(published: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names by index; the library's default is two nameless labels."""
    table = published.get("id2label") or {str(i): f"LABEL_{i}" for i in range(2)}
    return tuple(str(table[key]) for key in sorted(table, key=int))
