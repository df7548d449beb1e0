"""Imports of Hugging Face folders: ``config.json`` beside ``model.safetensors``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from detr.config import ContrastiveDenoisingConfig, DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.state_dicts import unwrapped
from detr.models.weights import (
    conditional_detr,
    d_fine,
    dab_detr,
    deformable_detr,
    deimv2,
    detr,
    lw_detr,
    rf_detr,
    rt_detr,
)
from detr.models.weights.backbones import plain_rules, transformers_resnet_rules
from detr.models.weights.folder import read_document, read_weights
from detr.models.weights.image_format import PUBLISHED, read_image_format
from detr.models.weights.imported import Imported, imported
from detr.models.weights.lw_detr_names import library_names
from detr.models.weights.renaming import Renamed, Rule, rename

_LABELS = "denoiser.label_embedding.weight"


class Family(NamedTuple):
    """How one published architecture is read.

    Attributes:
        config_of: ``config.json``, number of classes and place to our config.
        rules: Where its tensors go, the backbone's aside.
        backbone: Regular expression of what precedes the backbone's tensor names; ``None`` where
            the rules know the backbone.
        preprocess: What a detector's images went through in training, by our config.
        check: Raises UserError where tensors say otherwise than the config.
        library_names: Tensors under the library's names, where files have other ones.
        adapt: Changes tensors that are not laid out as ours, in place; says what was cut off, with
            the reason.
        license_note: What is to be known of a detector's license; empty where it is as usual.
    """

    config_of: Callable[[Mapping[str, Any], int, str], DetectorConfig]
    rules: Callable[[DetectorConfig], tuple[Rule, ...]]
    backbone: str | None
    preprocess: Callable[[DetectorConfig], PreprocessConfig] = lambda config: PUBLISHED
    check: Callable[[DetectorConfig, Mapping[str, Tensor], str], None] | None = None
    library_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = lambda x: dict(x)
    adapt: Callable[[dict[str, Tensor]], dict[str, str]] = lambda tensors: {}
    license_note: Callable[[DetectorConfig], str] = lambda config: ""


def _real_time(config: DetectorConfig) -> PreprocessConfig:
    """Of RT-DETR and D-FINE, whatever the config."""
    return rt_detr.INPUT


FAMILIES = {
    "detr": Family(detr.config_of, detr.rules, detr.BACKBONE),
    "conditional_detr": Family(conditional_detr.config_of, conditional_detr.rules, detr.BACKBONE),
    "dab_detr": Family(dab_detr.config_of, dab_detr.rules, dab_detr.BACKBONE),
    "deformable_detr": Family(
        deformable_detr.config_of, deformable_detr.rules, deformable_detr.BACKBONE
    ),
    "rt_detr": Family(rt_detr.config_of, rt_detr.rules, None, _real_time),
    "rt_detr_v2": Family(rt_detr.config_of, rt_detr.rules, None, _real_time),
    "d_fine": Family(d_fine.config_of, d_fine.rules, None, _real_time, d_fine.check),
    "deimv2": Family(
        deimv2.config_of,
        deimv2.rules,
        None,
        deimv2.input_of,
        deimv2.check,
        adapt=deimv2.adapt,
        license_note=deimv2.license_note,
    ),
    "lw_detr": Family(
        lw_detr.config_of,
        lw_detr.rules,
        None,
        lambda config: lw_detr.INPUT,
        library_names=library_names,
        adapt=lw_detr.adapt,
    ),
    "rf_detr": Family(
        rf_detr.config_of,
        rf_detr.rules,
        None,
        rf_detr.preprocess,
        library_names=library_names,
        adapt=rf_detr.adapt,
        license_note=rf_detr.license_note,
    ),
}
# The first class head, which all families call by one of these names.
_CLASS_HEAD = re.compile(
    r"(?:class_labels_classifier|(?:model\.decoder\.)?class_embed(?:\.0)?)\.bias"
)


def read_folder(folder: Path, canvas: tuple[int, int] | None = None) -> Imported:
    """The detector in a Hugging Face folder.

    Args:
        folder: With ``config.json``, weights and perhaps ``preprocessor_config.json``.
        canvas: (height, width) that images are fitted to, instead of the size the folder names.

    Raises:
        UserError: ``weights-source`` where the folder is not one, ``weights-family`` for a model
            type we have no architecture for, ``weights-input`` for images we cannot make, and what
            :func:`convert` raises.
    """
    published = read_document(folder / "config.json")
    found = convert(published, read_weights(folder), str(folder))
    return found._replace(preprocess=read_image_format(folder, canvas, found.preprocess))


def convert(published: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str) -> Imported:
    """Our detector of a published config and state dict.

    Args:
        published: Content of ``config.json``.
        tensors: The state dict, of the detector or of what is left of it without its heads.
        place: The source, for messages.

    Raises:
        UserError: ``weights-family``, ``weights-config``, ``weights-backbone``,
            ``weights-unknown-tensor``,
            ``weights-copies-differ``, ``weights-classes``, ``checkpoint-mismatch`` naming tensors
            left unfilled, or ``checkpoint-nonfinite``.
    """
    family = family_of(published, place)
    table = _class_table(published, place)
    tensors = _complete_names(family.library_names(unwrapped(tensors)))
    config = config_of(published, max(table, default=-1) + 1 or 1, place)
    outputs = _class_outputs(tensors)
    if outputs is not None:
        config = config.replace(num_classes=outputs - config.heads.classes.no_object)
    if family.check is not None:
        family.check(config, tensors, place)
    names = tuple(table.get(i, f"unused-{i}") for i in range(config.num_classes))
    notes = tuple(
        f"config.json calls class {i} {name}, but the detector has no such output"
        for i, name in table.items()
        if i >= len(names)
    )
    if told := family.license_note(config):
        notes += (told,)
    naming = family.rules(config)
    if family.backbone is not None:
        naming = (*naming, *_backbone_rules(published, family.backbone))
    cut = family.adapt(tensors)
    renamed = rename(tensors, naming, place)
    renamed.unused.update(cut)
    renamed.unused.update(drop_label_rows(renamed.tensors, config))
    if published.get("tie_word_embeddings", True):
        notes += _tie(config, renamed)
    found = imported(config, renamed, names, place, notes)
    kind = next(name for name, one in FAMILIES.items() if one is family)
    return found._replace(preprocess=family.preprocess(config), family=kind)


def config_of(published: Mapping[str, Any], classes: int, place: str) -> DetectorConfig:
    """Our config of a ``config.json`` of any content.

    Raises:
        UserError: ``weights-family``, or ``weights-config`` naming a value that is none of its
            key's, or that we have no architecture for.
    """
    family = family_of(published, place)
    try:
        return family.config_of(published, classes, place)
    # Pydantic's own is a ValueError; the others are what a reader meets in values of another kind.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # Which value it is, a config without it tells.
        for key in published:
            try:
                family.config_of({k: v for k, v in published.items() if k != key}, classes, place)
            except (UserError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
                continue
            value = textwrap.shorten(repr(published[key]), 80)
            raise UserError(
                "weights-config", f"{place}: config.json: {key}: {value} is not supported"
            ) from error
        raise UserError(
            "weights-config", f"{place}: config.json: is no {published['model_type']}'s"
        ) from error


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


def family_of(published: Mapping[str, Any], place: str) -> Family:
    """The family of a ``config.json``.

    Raises:
        UserError: ``weights-family``.
    """
    kind = str(published.get("model_type")).replace("-", "_")
    if kind not in FAMILIES:
        raise UserError(
            "weights-family", f"{place}: model type {kind!r} is none of {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _class_table(published: Mapping[str, Any], place: str) -> dict[int, str]:
    """Class names by the index of their output, which is their key in ``id2label``.

    Raises:
        UserError: ``weights-classes`` for a key that is no index.
    """
    table = published.get("id2label") or {}
    if not isinstance(table, Mapping):
        raise UserError("weights-classes", f"{place}: id2label: not a table of numbers and names")
    if strange := [key for key in table if not (str(key).isascii() and str(key).isdigit())]:
        raise UserError(
            "weights-classes", f"{place}: id2label: key {strange[0]!r} is not the number of a class"
        )
    return {int(key): str(name) for key, name in table.items()}


def _complete_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as of a whole detector; the library's model without heads lacks the prefix."""
    whole = any(name.startswith("model.") or _CLASS_HEAD.fullmatch(name) for name in tensors)
    return dict(tensors) if whole else {f"model.{name}": x for name, x in tensors.items()}


def _class_outputs(tensors: Mapping[str, Tensor]) -> int | None:
    """Rows of the class head; ``None`` without one."""
    return next((len(x) for name, x in tensors.items() if _CLASS_HEAD.fullmatch(name)), None)


def _tie(config: DetectorConfig, renamed: Renamed) -> tuple[str, ...]:
    """Fills in heads that the library leaves out of a file because they are tied to the first.

    Only if it left out all of them: one that is missing among others is a damaged file.
    """
    notes: list[str] = []
    decoder = config.decoder
    kinds = (
        ("class_heads", "class_head", decoder.own_heads),
        ("box_heads", "box_head", decoder.own_box_heads),
    )
    for kind, last, count in kinds:
        first = f"decoder.{kind}.0."
        targets = [f"decoder.{kind}.{i}." for i in range(1, count)]
        if config.queries.from_proposals:
            targets.append(f"source.proposals.{last}.")
        held = {n.removeprefix(first): x for n, x in renamed.tensors.items() if n.startswith(first)}
        if targets and held and not any(n.startswith(tuple(targets)) for n in renamed.tensors):
            renamed.tensors.update({t + rest: x for t in targets for rest, x in held.items()})
            notes.append(f"{kind}: the file holds the first alone, which all others are tied to")
    return tuple(notes)
