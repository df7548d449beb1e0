"""Sidecars of earlier releases in the form of this one.

Format 1 described a detector by one flat table. Format 2 describes it part by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT = 2
# Where the keys of a flat table went.
MOVED: dict[str, tuple[str, ...]] = {
    "heads": ("attention_heads",),
    "levels": ("neck.levels",),
    "pe_temperature": ("positions.temperature",),
    "pe_offset": ("positions.offset",),
    "attention": ("encoder.kind", "decoder.cross_attention.kind"),
    "points": ("encoder.points", "decoder.cross_attention.points"),
    "ffn": ("encoder.ffn", "decoder.ffn"),
    "activation": ("encoder.activation", "decoder.activation"),
    "encoder_layers": ("encoder.layers",),
    "memory_fusion": ("encoder.fusion",),
    "query": ("queries.kind",),
    "queries": ("queries.number",),
    "learned_content": ("queries.learned_content",),
    "patterns": ("queries.patterns",),
    "random_anchors": ("queries.random_centers",),
    "proposal_tokens": ("queries.proposal_tokens",),
    "denoising": ("queries.denoising",),
    "one_to_many": ("queries.one_to_many",),
    "decoder_layers": ("decoder.layers",),
    "refine": ("decoder.refinement.kind",),
    "shared_heads": ("decoder.refinement.shared_heads",),
    "shared_decoder": ("decoder.shared_layers",),
    "classification": ("heads.classes.kind",),
    "logit_eps": ("heads.boxes.logit_eps",),
}
# What a key that a file of format 1 leaves out stands for.
_LEFT_OUT: dict[str, Any] = {
    "backbone": {},
    "attention": "deformable",
    "levels": 4,
    "width": 256,
    "heads": 8,
    "points": 4,
    "ffn": 1024,
    "activation": "relu",
    "dropout": 0.0,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "queries": 300,
    "query": "learned",
    "learned_content": False,
    "patterns": 0,
    "random_anchors": False,
    "refine": "none",
    "proposal_tokens": "inside",
    "logit_eps": 1e-5,
    "shared_heads": False,
    "shared_decoder": False,
    "memory_fusion": None,
    "classification": "sigmoid",
    "denoising": None,
    "one_to_many": None,
    "pe_temperature": 10000.0,
    "pe_offset": -0.5,
    "detections": 100,
}
_DENOISING_LEFT_OUT: dict[str, Any] = {
    "contrastive": True,
    "number": 100,
    "label_noise": 0.25,
    "box_noise": 1.0,
    "harder_negatives": True,
}


def upgraded(content: Any) -> Any:
    """A model's sidecar of any format we know as one of this format.

    What is no such sidecar is returned as it is, for its reader to refuse.

    Args:
        content: As read from JSON.
    """
    if not isinstance(content, Mapping) or content.get("format") != 1:
        return content
    detector = content.get("detector")
    if isinstance(detector, Mapping):
        detector = composed(detector)
    return {**content, "format": FORMAT, "detector": detector}


def composed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A detector of format 1, part by part.

    Keys that format 1 does not know are kept, for the config to refuse.
    """
    strange = {key: flat[key] for key in flat if key not in _LEFT_OUT}
    flat = _LEFT_OUT | dict(flat)
    attention, refinement = flat["attention"], {"kind": flat["refine"]}
    if flat["refine"] != "none":
        refinement["shared_heads"] = flat["shared_heads"]
    deformable = attention == "deformable"
    anchors = flat["query"] == "anchors"
    stack = {"ffn": flat["ffn"], "activation": flat["activation"]}
    encoder = {"kind": "deformable" if deformable else "dense", "layers": flat["encoder_layers"]}
    encoder |= stack | {"fusion": flat["memory_fusion"]}
    cross = {"kind": attention}
    if deformable:
        encoder["points"] = flat["points"]
        cross |= {"points": flat["points"], "scaled_positions": anchors}
    else:
        encoder["scaled_positions"] = anchors
    return strange | {
        "width": flat["width"],
        "attention_heads": flat["heads"],
        "dropout": flat["dropout"],
        "backbone": flat["backbone"],
        "neck": {"levels": flat["levels"], "group_norm": deformable},
        "positions": {"temperature": flat["pe_temperature"], "offset": flat["pe_offset"]},
        "encoder": encoder,
        "queries": _queries(flat),
        "decoder": {
            "layers": flat["decoder_layers"],
            **stack,
            "cross_attention": cross,
            "refinement": refinement,
            "shared_layers": flat["shared_decoder"],
            "final_norm": not deformable or flat["query"] == "mixed",
        },
        "heads": {
            "classes": {"kind": flat["classification"]},
            "boxes": {"logit_eps": flat["logit_eps"]},
        },
        "detections": flat["detections"],
    }


def _queries(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The queries of a flat table."""
    kind, attention = flat["query"], flat["attention"]
    queries: dict[str, Any] = {"kind": kind, "number": flat["queries"]}
    if kind == "learned":
        references = {"deformable": "linear", "conditional": "mlp"}
        queries["reference"] = references.get(attention, "center")
        queries["learned_content"] = attention == "deformable"
    elif kind == "anchors":
        queries["learned_content"] = attention == "deformable"
        queries["patterns"] = flat["patterns"]
        queries["random_centers"] = flat["random_anchors"]
    else:
        queries["proposal_tokens"] = flat["proposal_tokens"]
    if kind == "two_stage":
        queries["learned_content"] = flat["learned_content"]
        queries["one_to_many"] = flat["one_to_many"]
    if kind in ("anchors", "mixed"):
        queries["denoising"] = _denoising(flat["denoising"])
    return queries


def _denoising(flat: Any) -> Any:
    """Denoising, whose kind follows from the queries'."""
    if not isinstance(flat, Mapping):
        return flat
    flat = _DENOISING_LEFT_OUT | dict(flat)
    if not flat.pop("contrastive"):
        flat["groups"] = flat.pop("number")
        del flat["harder_negatives"]
    return flat
