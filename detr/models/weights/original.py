"""Checkpoints of the original repositories: DETR, Conditional-DETR, Deformable-DETR and DINO.

They carry no readable config, so the architecture is read off names and shapes. Names are put in
the transformers library's terms first, whose tables then say where they go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr.config import BackboneConfig, DenoisingConfig, DetectorConfig
from detr.errors import UserError
from detr.models.detector import build_detector
from detr.models.tensors import match_tensors
from detr.models.weights import conditional_detr, deformable_detr, detr
from detr.models.weights.backbones import plain_rules
from detr.models.weights.imported import Imported
from detr.models.weights.renaming import Rule, rename, split_projections

_BACKBONE = r"backbone\.0\.body\."
_WB = "(weight|bias)"
# ResNet by blocks of its third stage and convolutions of a block.
_RESNETS = {(2, 2): "resnet18", (6, 2): "resnet34", (6, 3): "resnet50", (23, 3): "resnet101"}
_COMMON = (
    (r"transformer\.(encoder|decoder)\.layers\.(\d+)\.linear([12])\.", r"model.\1.layers.\2.fc\3."),
    (
        r"transformer\.encoder\.layers\.(\d+)\.norm1\.",
        r"model.encoder.layers.\1.self_attn_layer_norm.",
    ),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.layers.\1.final_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (
        r"transformer\.decoder\.layers\.(\d+)\.(?:cross|multihead)_attn\.",
        r"model.decoder.layers.\1.encoder_attn.",
    ),
    (r"query_embed\.weight", "model.query_position_embeddings.weight"),
    (r"transformer\.decoder\.norm\.", "model.decoder.layernorm."),
)
# The first norm of a decoder layer follows self-attention, but in Deformable DETR cross-attention,
# which was written down first and runs second.
_DENSE = (
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm1\.",
        r"model.decoder.layers.\1.self_attn_layer_norm.",
    ),
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm2\.",
        r"model.decoder.layers.\1.encoder_attn_layer_norm.",
    ),
    (r"input_proj\.(weight|bias)", r"model.input_projection.\1"),
    (r"class_embed\.", "class_labels_classifier."),
    (r"bbox_embed\.", "bbox_predictor."),
)
_SAMPLED = (
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm1\.",
        r"model.decoder.layers.\1.encoder_attn_layer_norm.",
    ),
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm2\.",
        r"model.decoder.layers.\1.self_attn_layer_norm.",
    ),
    (r"input_proj\.", "model.input_proj."),
)


class Family(NamedTuple):
    """How one original repository's checkpoints are read.

    Attributes:
        mark: A tensor only they have.
        names: Substitutions at the start of a name, the first that fits.
    """

    mark: str
    names: Sequence[tuple[str, str]]


# In order: the marks of later ones also occur in earlier ones.
FAMILIES = {
    "dino": Family("transformer.tgt_embed.weight", (*_COMMON, *_SAMPLED)),
    "deformable_detr": Family("transformer.level_embed", (*_COMMON, *_SAMPLED)),
    "conditional_detr": Family(
        "transformer.decoder.layers.0.ca_qcontent_proj.weight", (*_COMMON, *_DENSE)
    ),
    "detr": Family(
        "transformer.decoder.layers.0.multihead_attn.in_proj_weight", (*_COMMON, *_DENSE)
    ),
}


def convert(tensors: Mapping[str, Tensor], place: str, dilated: bool = False) -> Imported:
    """Our detector of an original checkpoint's state dict.

    Args:
        tensors: The state dict.
        place: The source, for messages.
        dilated: The backbone's last stage is (DC5); nothing in the tensors tells.

    Raises:
        UserError: ``weights-family`` for another repository's, ``weights-backbone``,
            ``weights-unknown-tensor``, ``weights-copies-differ`` or ``checkpoint-mismatch``.
    """
    kind = next((k for k, family in FAMILIES.items() if family.mark in tensors), None)
    if kind is None:
        raise UserError(
            "weights-family",
            f"{place}: not a checkpoint of {', '.join(FAMILIES)}; none has {len(tensors)} tensors "
            f"such as {min(tensors, default='none at all')}",
        )
    config = _config(kind, tensors, place, dilated)
    named = {
        _translated(name, FAMILIES[kind].names): x for name, x in split_projections(tensors).items()
    }
    if kind == "dino":
        rows = named["label_enc.weight"]
        # Its label book has rows that no label ever reads.
        named["label_enc.weight"] = rows[: config.num_classes]
    tables = {
        "dino": _dino_rules,
        "deformable_detr": deformable_detr.rules,
        "conditional_detr": conditional_detr.rules,
        "detr": detr.rules,
    }
    renamed = rename(named, (*tables[kind](config), *plain_rules(_BACKBONE)), place)
    detector = build_detector(config, pretrained=False)
    match_tensors(detector, renamed.tensors, place)
    names = tuple(f"class-{i}" for i in range(config.num_classes))
    return Imported(detector.eval(), names, renamed.unused)


def _translated(name: str, names: Sequence[tuple[str, str]]) -> str:
    """A name in the transformers library's terms."""
    for pattern, replacement in names:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return re.sub(r"^transformer\.", "model.", name)


def _config(kind: str, tensors: Mapping[str, Tensor], place: str, dilated: bool) -> DetectorConfig:
    """The architecture, from names and shapes."""
    deformable = kind in ("dino", "deformable_detr")
    bias = next(
        x for n in ("class_embed.0.bias", "class_embed.bias") if (x := tensors.get(n)) is not None
    )
    queries = next(
        (
            tensors[n]
            for n in ("query_embed.weight", "transformer.tgt_embed.weight")
            if n in tensors
        ),
        None,
    )
    options: dict[str, Any] = {
        "num_classes": len(bias) - (kind == "detr"),
        "backbone": _backbone(tensors, place, deformable, dilated),
        "levels": len(tensors["transformer.level_embed"]) if deformable else 1,
        "width": tensors["transformer.decoder.layers.0.linear1.weight"].shape[1],
        "ffn": tensors["transformer.decoder.layers.0.linear1.weight"].shape[0],
        "encoder_layers": _depth(tensors, "transformer.encoder.layers"),
        "decoder_layers": _depth(tensors, "transformer.decoder.layers"),
        "queries": 300 if queries is None else len(queries),
    }
    if kind == "detr":
        return DetectorConfig(
            attention="dense", classification="softmax", pe_offset=0.0, dropout=0.1, **options
        )
    if kind == "conditional_detr":
        return DetectorConfig(attention="conditional", pe_offset=0.0, dropout=0.1, **options)
    if kind == "dino":
        heads = [tensors[f"class_embed.{i}.weight"] for i in range(options["decoder_layers"])]
        return DetectorConfig(
            query="mixed",
            refine="look_forward_twice",
            shared_heads=all(torch.equal(heads[0], x) for x in heads),
            denoising=DenoisingConfig(),
            pe_temperature=20.0,
            pe_offset=0.0,
            detections=300,
            **options,
        )
    refined = "transformer.decoder.bbox_embed.0.layers.0.weight" in tensors
    return DetectorConfig(
        query="two_stage" if "transformer.enc_output.weight" in tensors else "learned",
        refine="detach" if refined else "none",
        dropout=0.1,
        **options,
    )


def _backbone(
    tensors: Mapping[str, Tensor], place: str, deformable: bool, dilated: bool
) -> BackboneConfig:
    """The ResNet, from its tensors."""
    body = "backbone.0.body."
    blocks = _depth(tensors, f"{body}layer3")
    convolutions = 3 if f"{body}layer1.0.conv3.weight" in tensors else 2
    name = _RESNETS.get((blocks, convolutions))
    if name is None:
        raise UserError("weights-backbone", f"{place}: the backbone is no ResNet-18, 34, 50 or 101")
    strides = (16,) if dilated else (32,)
    return BackboneConfig(
        name=name,
        strides=(8, 16, 32) if deformable else strides,
        norm="frozen",
        options={"output_stride": 16} if dilated else {},
    )


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number after a prefix."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return max((int(m[1]) for m in found if m), default=-1) + 1


def _dino_rules(config: DetectorConfig) -> tuple[Rule, ...]:
    """Where DINO's tensors go, the backbone's aside."""
    heads = deformable_detr.rules(config)
    if config.shared_heads:
        shared = config.model_copy(update={"refine": "none"})
        heads = deformable_detr.rules(shared)
    return (
        Rule(r"model\.tgt_embed\.weight", "source.content.weight"),
        Rule(rf"model\.enc_out_class_embed\.{_WB}", r"source.proposals.class_head.\1"),
        Rule(r"model\.enc_out_bbox_embed\.(.+)", r"source.proposals.box_head.\1"),
        Rule(rf"model\.decoder\.layernorm\.{_WB}", r"decoder.norm.\1"),
        Rule(r"model\.decoder\.ref_point_head\.(.+)", r"source.reference_mlp.\1"),
        Rule(r"label_enc\.weight", "denoiser.label_embedding.weight"),
        *heads,
    )
