"""Checkpoints of the original repositories.

Those of DETR, Conditional-DETR, DAB-DETR, Deformable-DETR, DN-DETR, H-Deformable-DETR and DINO, of
detrex's DINO, of Mask DINO (:mod:`mask_dino`), of RT-DETR (:mod:`original_rt_detr`), of D-FINE
(:mod:`original_d_fine`), of DEIMv2 (:mod:`original_deimv2`), of LW-DETR and RF-DETR
(:mod:`original_lw_detr`). The architecture is read off names and shapes (:mod:`original_config`).
Names are put in the transformers library's terms first, whose tables then say where they go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from detr.config import DetectorConfig
from detr.errors import UserError
from detr.models.state_dicts import unwrapped
from detr.models.weights import (
    conditional_detr,
    deformable_detr,
    detr,
    detrex,
    lw_detr_names,
    mask_dino,
    mmdet,
    original_config,
    original_d_fine,
    original_deimv2,
    original_lw_detr,
    original_rt_detr,
)
from detr.models.weights.backbones import convnext_rules, plain_rules, swin_rules
from detr.models.weights.imported import Imported, imported
from detr.models.weights.renaming import Rule, rename, split_projections

_BACKBONE = r"backbone\.0\.body\."
_WB = "(weight|bias)"
_LOSS = Rule(r"criterion\..+", None, "of the training's loss")
_DECODER = r"transformer\.decoder\.layers\.(\d+)\."
_COMMON = (
    (
        r"transformer\.(encoder|decoder)\.layers\.(\d+)\.linear([12])\.",
        r"model.\1.layers.\2.fc\3.",
    ),
    (
        r"transformer\.(encoder|decoder)\.layers\.(\d+)\.activation\.",
        r"model.\1.layers.\2.activation_fn.",
    ),
    (
        r"transformer\.encoder\.layers\.(\d+)\.norm1\.",
        r"model.encoder.layers.\1.self_attn_layer_norm.",
    ),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.layers.\1.final_layer_norm."),
    (rf"{_DECODER}norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (rf"{_DECODER}(?:cross|multihead)_attn\.", r"model.decoder.layers.\1.encoder_attn."),
    (r"query_embed\.weight", "model.query_position_embeddings.weight"),
    (r"transformer\.decoder\.norm\.", "model.decoder.layernorm."),
)
# The first norm of a decoder layer follows self-attention, but in Deformable DETR cross-attention,
# which was written down first and runs second.
_DENSE = (
    (rf"{_DECODER}norm1\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
    (rf"{_DECODER}norm2\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (r"input_proj\.(weight|bias)", r"model.input_projection.\1"),
    (r"class_embed\.", "class_labels_classifier."),
    (r"(?:transformer\.decoder\.)?bbox_embed\.", "bbox_predictor."),
)
_SAMPLED = (
    (rf"{_DECODER}norm1\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (rf"{_DECODER}norm2\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
    (r"input_proj\.", "model.input_proj."),
)


def _anchor_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """What DAB-DETR and all that follow it have besides, with and without denoising."""
    return (
        Rule(r"refpoint_embed\.weight", "source.anchors.weight"),
        Rule(r"(?:tgt_embed|model\.patterns)\.weight", "source.content.weight"),
        Rule(r"label_enc\.weight", "denoiser.label_embedding.weight"),
        Rule(r"model\.decoder\.ref_point_head\.(.+)", r"source.reference_mlp.\1"),
    )


def _dab_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """DAB-DETR and DN-DAB-DETR: Conditional DETR's layers around anchors."""
    return (
        *_anchor_rules(config),
        Rule(r"model\.encoder\.query_scale\.(.+)", r"encoder.position_scale.\1"),
        Rule(r"model\.decoder\.ref_anchor_head\.(.+)", r"decoder.spatial.size.\1"),
        *conditional_detr.rules(config),
    )


def _dab_deformable_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """DAB-Deformable-DETR and DN-Deformable-DETR."""
    return (
        *_anchor_rules(config),
        Rule(r"model\.decoder\.query_scale\.(.+)", r"decoder.position_scale.\1"),
        *deformable_detr.rules(config),
    )


def _hybrid_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """H-Deformable-DETR: two stages, but with learned content."""
    return (
        Rule(r"model\.query_position_embeddings\.weight", "source.content.weight"),
        *deformable_detr.rules(config),
    )


def _dino_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """DINO."""
    return (
        Rule(r"model\.tgt_embed\.weight", "source.content.weight"),
        Rule(rf"model\.enc_out_class_embed\.{_WB}", r"source.proposals.class_head.\1"),
        Rule(r"model\.enc_out_bbox_embed\.(.+)", r"source.proposals.box_head.\1"),
        Rule(rf"model\.decoder\.layernorm\.{_WB}", r"decoder.norm.\1"),
        Rule(r"model\.decoder\.ref_point_head\.(.+)", r"source.reference_mlp.\1"),
        Rule(r"label_enc\.weight", "denoiser.label_embedding.weight"),
        # Stable-DINO's.
        Rule(rf"model\.encoder\.fusion_layer\.(\d)\.{_WB}", r"encoder.fusion.joints.0.\1.\2"),
        *deformable_detr.rules(config),
    )


def _mask_dino_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Mask DINO."""
    return (
        Rule(r"mask_embed\.(.+)", r"decoder.mask_heads.0.\1"),
        Rule(rf"mask_features\.{_WB}", r"pixels.project.\1"),
        Rule(rf"adapter_1\.norm\.{_WB}", r"pixels.lateral.1.\1"),
        Rule(r"adapter_1\.weight", "pixels.lateral.0.weight"),
        Rule(rf"layer_1\.norm\.{_WB}", r"pixels.output.1.\1"),
        Rule(r"layer_1\.weight", "pixels.output.0.weight"),
        *_dino_rules(config),
    )


class Family(NamedTuple):
    """How one original repository's checkpoints are read.

    Attributes:
        marks: Tensors that together only they have.
        names: Substitutions at the start of a name, the first that fits.
        rules: Where the tensors go, the backbone's aside.
        config: The family's detector, of the checkpoint's kind and number of queries.
    """

    marks: tuple[str, ...]
    names: Sequence[tuple[str, str]]
    rules: Callable[[DetectorConfig], tuple[Rule, ...]]
    config: original_config.FamilyOf


_SPATIAL = "transformer.decoder.layers.0.ca_qcontent_proj.weight"
_LEVELS = "transformer.level_embed"
# In order: the marks of later ones also occur in earlier ones.
FAMILIES = {
    "mask_dino": Family(
        (_LEVELS, mask_dino.PIXELS),
        (*_COMMON, *_SAMPLED),
        _mask_dino_rules,
        original_config.mask_dino,
    ),
    "dino": Family(
        (_LEVELS, "transformer.enc_output.weight", "transformer.tgt_embed.weight"),
        (*_COMMON, *_SAMPLED),
        _dino_rules,
        original_config.dino,
    ),
    "dab_deformable_detr": Family(
        (_LEVELS, "refpoint_embed.weight"),
        (*_COMMON, *_SAMPLED),
        _dab_deformable_rules,
        original_config.dab_deformable,
    ),
    "h_deformable_detr": Family(
        (_LEVELS, "transformer.enc_output.weight", "query_embed.weight"),
        (*_COMMON, *_SAMPLED),
        _hybrid_rules,
        original_config.hybrid,
    ),
    "deformable_detr": Family(
        (_LEVELS,), (*_COMMON, *_SAMPLED), deformable_detr.rules, original_config.deformable
    ),
    "dab_detr": Family(
        (_SPATIAL, "refpoint_embed.weight"),
        (*_COMMON, *_DENSE),
        _dab_rules,
        original_config.dab,
    ),
    "conditional_detr": Family(
        (_SPATIAL,), (*_COMMON, *_DENSE), conditional_detr.rules, original_config.conditional
    ),
    "detr": Family(
        ("transformer.decoder.layers.0.multihead_attn.in_proj_weight",),
        (*_COMMON, *_DENSE),
        detr.rules,
        original_config.dense,
    ),
}


def convert(
    tensors: Mapping[str, Tensor],
    place: str,
    options: Mapping[str, Any] | None = None,
    dilated: bool = False,
    discrete: bool = False,
    deim: bool = False,
    initial_boxes: mask_dino.InitialBoxes | None = None,
) -> Imported:
    """Our detector of an original checkpoint's state dict.

    Args:
        tensors: The state dict.
        place: The source, for messages.
        options: The training's command line, where the checkpoint tells it.
        dilated: The backbone's last stage is (DC5); nothing in the tensors tells.
        discrete: Attention samples whole cells (RT-DETRv2, D-FINE); nothing in the tensors tells.
        deim: It is DEIM's D-FINE or RT-DETRv2; nothing in the tensors tells.
        initial_boxes: Where Mask DINO's anchors come from; without it, what
            :func:`mask_dino.options` takes.

    Raises:
        UserError: ``weights-family`` for another repository's, ``weights-config`` for a variant we
            have no architecture for, ``weights-backbone``, ``weights-unknown-tensor``,
            ``weights-copies-differ`` or ``checkpoint-mismatch``.
    """
    told = dict(options or {})
    notes: tuple[str, ...] = ()
    told["dilation"] = dilated or bool(told.get("dilation"))
    tensors = unwrapped(tensors)
    if initial_boxes is not None and mask_dino.MARK not in tensors:
        raise UserError("weights-config", f"{place}: --initial-boxes is for Mask DINO")
    if original_deimv2.MARK in tensors:
        if deim:
            raise UserError("weights-config", f"{place}: --deim is for RT-DETRv2 and D-FINE")
        return original_deimv2.convert(tensors, place, discrete)
    if original_d_fine.MARK in tensors:
        found = original_d_fine.convert(tensors, place, discrete, deim)
        return found._replace(family="deim") if deim else found
    if original_rt_detr.MARK in tensors:
        found = original_rt_detr.convert(tensors, place, discrete, deim)
        return found._replace(family="deim") if deim else found
    if lw_detr_names.MARK in tensors and not discrete and not deim:
        return original_lw_detr.convert(tensors, place, options)
    if discrete:
        raise UserError("weights-config", f"{place}: --discrete is for RT-DETRv2 and D-FINE")
    if deim:
        raise UserError("weights-config", f"{place}: --deim is for RT-DETRv2 and D-FINE")
    by_mmdet = mmdet.MARK in tensors
    if by_mmdet:
        told |= mmdet.options(tensors)
        tensors = mmdet.original_names(tensors)
    if mask_dino.MARK in tensors:
        told |= mask_dino.options(tensors, told)
        if initial_boxes is not None:
            told["initial_boxes"] = initial_boxes
        elif "initialize_box_type" not in told:
            notes = (
                f"anchors are taken to be {told['initial_boxes']}, as in the published config; "
                "no tensor tells (--initial-boxes)",
            )
        tensors = mask_dino.original_names(tensors, place)
    by_detrex = detrex.MARK in tensors
    if by_detrex:
        tensors = detrex.original_names(tensors)
    kind = next((k for k, f in FAMILIES.items() if all(m in tensors for m in f.marks)), None)
    if kind is None:
        raise UserError(
            "weights-family",
            f"{place}: not a checkpoint of {', '.join(FAMILIES)}: "
            + (
                f"its {len(tensors)} tensors, such as {min(tensors)}, are another model's"
                if tensors
                else "it holds no tensors"
            ),
        )
    family = FAMILIES[kind]
    config = original_config.read(tensors, told, place, family.config)
    if by_detrex and kind == "dino":
        config = config.replace(positions=detrex.DINO_POSITIONS)
    named = {_translated(name, family.names): x for name, x in split_projections(tensors).items()}
    surplus: dict[str, str] = {}
    labels, count = named.get("label_enc.weight"), original_config.class_count(tensors)
    if labels is not None and count is None:
        del named["label_enc.weight"]
        surplus["label_enc.weight"] = "without a class head nobody knows which classes"
    elif labels is not None and kind == "dino" and len(labels) > config.num_classes:
        count = config.num_classes
        surplus[f"label_enc.weight[{count}:]"] = "rows that no label ever reads"
        named["label_enc.weight"] = labels[:count]
    swin = original_config.swin_prefix(tensors)
    strides = (*config.mask_strides, *config.backbone.strides)
    backbone = plain_rules(_BACKBONE)
    if swin is not None:
        backbone = swin_rules(re.escape(swin), strides)
    elif original_config.is_convnext(tensors):
        backbone = convnext_rules(re.escape(original_config.CONVNEXT), strides)
    renamed = rename(named, (_LOSS, *family.rules(config), *backbone), place)
    renamed.unused.update(surplus)
    names = tuple(f"class-{i}" for i in range(config.num_classes))
    whose = "detrex" if by_detrex else "mmdet" if by_mmdet else kind
    return imported(config, renamed, names, place, notes)._replace(family=whose)


def _translated(name: str, names: Sequence[tuple[str, str]]) -> str:
    """A name in the transformers library's terms."""
    for pattern, replacement in names:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return re.sub(r"^transformer\.", "model.", name)
