"""What a detector is made of: one validated, frozen config for every architecture.

Torch-free on purpose: a bundle's sidecar carries this config to targets that have no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """Base of every config: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassMap(Strict):
    """The one mapping between class indices, names and the data set's category ids.

    Attributes:
        names: Class name of each index.
        category_ids: COCO category id of each index (1-based positions for KITTI).
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


class BackboneConfig(Strict):
    """A timm ``features_only`` backbone.

    Attributes:
        name: timm model name (``resnet18``, ``resnet50``, ...).
        strides: Strides of the feature maps taken, finest first (8, 16, 32 are C3, C4, C5).
        norm: ``frozen`` keeps batch-norm statistics and scales fixed (needs pretrained weights);
            ``train`` trains them (from scratch).
        pretrained: Path of a ``.safetensors`` file or ``hub:NAME`` (a timm tag); ``None`` starts
            from random weights.
        options: Further keyword arguments of timm's ``create_model`` (``channels``, ``layers``).
        map_norm: A layer norm over the channels of each map (detectors on Swin and ConvNeXt).
        frozen_stages: How many leading stages (stem, stage 1, ...) take no gradient.
    """

    name: str = "resnet50"
    strides: tuple[int, ...] = (8, 16, 32)
    norm: Literal["frozen", "train"] = "train"
    pretrained: str | None = None
    options: dict[str, Any] = {}
    map_norm: bool = False
    frozen_stages: Annotated[int, Field(ge=0)] = 0

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Tuples become lists, so that a config equals itself after a trip through JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


class DenoisingConfig(Strict):
    """Denoising queries (DN-DETR section 4; contrastive: DINO section 3.3).

    Attributes:
        contrastive: DINO's: a negative beside every positive, noise on corners. Otherwise
            DN-DETR's: positives only, noise on centre and size, an indicator in the content.
        number: Contrastive: budget of denoising positives, DINO's ``dn_number``. Otherwise the
            number of groups (DN-DETR: 5).
        label_noise: Probability that a label is replaced by a random one (DINO: 0.5 * 0.5,
            DN-DETR: 0.2).
        box_noise: Scale of the box noise (DINO: 1.0, DN-DETR: 0.4).
        harder_negatives: Contrastive: a negative's corners move by one to two half sizes (DINO);
            otherwise no farther than a positive's (Stable-DINO's released config).
    """

    contrastive: bool = True
    number: Annotated[int, Field(ge=1)] = 100
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.25
    box_noise: Annotated[float, Field(ge=0)] = 1.0
    harder_negatives: bool = True


class OneToManyConfig(Strict):
    """A second group of queries that shares each ground-truth box, in training (H-DETR).

    Attributes:
        queries: Their number.
        repeat: How many of them each box is assigned to.
    """

    queries: Annotated[int, Field(ge=1)] = 1500
    repeat: Annotated[int, Field(ge=1)] = 6


class DetectorConfig(Strict):
    """A detection transformer.

    Attributes:
        num_classes: Number of foreground classes K.
        attention: ``deformable``, ``dense`` (DETR: every token, one level) or ``conditional``
            (dense, but the decoder compares content with content and place with place: Conditional
            DETR, DAB-DETR).
        levels: Number of feature levels V; levels beyond the backbone's maps are stride-2 convs.
        width, heads, points: Model width D, attention heads M, sampling points P per head and
            level.
        ffn: Hidden width of the feed-forward networks.
        activation: Within them; ``prelu`` learns one slope per network (DAB-DETR).
        encoder_layers, decoder_layers: Depths; 0 encoder layers hand the projected maps to the
            decoder.
        queries: Number of object queries N of the detector's own group.
        query: ``learned`` (an embedding; the reference is made from it), ``anchors`` (learned
            boxes: DAB-DETR), ``two_stage`` (position and content from the encoder's proposals) or
            ``mixed`` (DINO: anchors from proposals, learned content).
        learned_content: Two-stage content comes from an embedding, not the proposals (H-DETR).
        patterns: Each anchor is used with this many learned contents (DAB-DETR; 0: content zero).
        random_anchors: Anchor centres start evenly spread over the image instead of normally
            around its middle (DAB-DETR).
        refine: ``none`` (fixed references, shared heads), ``detach`` (iterative refinement) or
            ``look_forward_twice`` (DINO section 3.5).
        proposal_tokens: Which tokens may propose: those ``inside`` the image, or ``all``, as in the
            original code, where those in the padding and at the edges compete with zero content.
        logit_eps: How near to 0 and 1 a reference may come before its logit is taken (Deformable
            DETR 1e-5; DAB-DETR, DN-DETR and DINO 1e-3, which keeps boxes away from the edges).
        shared_heads: One class and one box head for all decoder layers (official DINO) instead of a
            copy per layer.
        shared_decoder: One set of decoder weights for all layers (OD-DETR).
        memory_fusion: How the decoder's memory combines the encoder's layers (Stable-DINO section
            4.3), or ``None`` for the last alone.
        classification: ``sigmoid`` per class, or ``softmax`` with a last logit for "no object"
            (DETR).
        denoising: Denoising queries in training, or ``None``.
        one_to_many: Queries that share boxes in training, or ``None``.
        pe_temperature, pe_offset: Of the 2-D sine embedding of the image plane.
        detections: How many (query, class) pairs the post-processing keeps.
    """

    num_classes: Annotated[int, Field(ge=1)]
    backbone: BackboneConfig = BackboneConfig()
    attention: Literal["deformable", "dense", "conditional"] = "deformable"
    levels: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=8)] = 256
    heads: Annotated[int, Field(ge=1)] = 8
    points: Annotated[int, Field(ge=1)] = 4
    ffn: Annotated[int, Field(ge=1)] = 1024
    activation: Literal["relu", "prelu"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    encoder_layers: Annotated[int, Field(ge=0)] = 6
    decoder_layers: Annotated[int, Field(ge=1)] = 6
    queries: Annotated[int, Field(ge=1)] = 300
    query: Literal["learned", "anchors", "two_stage", "mixed"] = "learned"
    learned_content: bool = False
    patterns: Annotated[int, Field(ge=0)] = 0
    random_anchors: bool = False
    refine: Literal["none", "detach", "look_forward_twice"] = "none"
    proposal_tokens: Literal["inside", "all"] = "inside"
    logit_eps: Annotated[float, Field(gt=0, lt=0.01)] = 1e-5
    shared_heads: bool = False
    shared_decoder: bool = False
    memory_fusion: Literal["simple", "u", "dense"] | None = None
    classification: Literal["sigmoid", "softmax"] = "sigmoid"
    denoising: DenoisingConfig | None = None
    one_to_many: OneToManyConfig | None = None
    pe_temperature: float = 10000.0
    pe_offset: float = -0.5
    detections: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _consistent(self) -> DetectorConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4 (2-D sine embedding)")
        for reason in self._contradictions():
            raise ValueError(reason)
        return self

    def _contradictions(self) -> Iterator[str]:
        """What cannot go together, and why."""
        strides, proposals = self.backbone.strides, self.query in ("two_stage", "mixed")
        if list(strides) != sorted(set(strides)):
            yield f"backbone.strides {', '.join(map(str, strides))}: name each once, finest first"
        if self.levels < len(strides):
            yield f"levels {self.levels} is less than the backbone's maps {len(strides)}"
        if self.attention != "deformable":
            if self.levels != 1:
                yield (
                    f"attention: {self.attention} works on one map: set levels to 1 and "
                    "backbone.strides to (32,), or (16,) for a dilated last stage"
                )
            if proposals:
                yield f"query: {self.query} needs attention: deformable (proposals per level)"
        if self.attention == "dense" and self.query == "anchors":
            yield "query: anchors needs attention: conditional or deformable, which look at places"
        if self.levels >= 5 and 4 not in strides:
            yield f"levels: {self.levels} needs the stride-4 map: backbone.strides 4, 8, 16, 32"
        if self.query != "learned" and self.refine == "none":
            yield (
                f"query: {self.query} starts from boxes and needs refine: detach or "
                "look_forward_twice"
            )
        if self.refine != "none" and self.query == "learned" and self.attention != "deformable":
            yield f"refine: {self.refine} needs attention: deformable, or query: anchors"
        if self.shared_decoder and not (self.shared_heads or self.refine == "none"):
            yield "shared_decoder repeats one layer, so heads per layer mean nothing: shared_heads"
        if self.shared_decoder and self.attention == "conditional":
            yield "shared_decoder needs layers that are alike; a first conditional layer is not"
        if self.memory_fusion is not None and self.encoder_layers == 0:
            yield f"memory_fusion: {self.memory_fusion} needs encoder layers to fuse"
        if (self.patterns or self.random_anchors) and self.query != "anchors":
            yield "patterns and random_anchors need query: anchors"
        if self.patterns and self.attention == "deformable":
            yield "patterns need attention: conditional; deformable anchors have learned content"
        if self.classification == "softmax" and (proposals or self.denoising is not None):
            yield "classification: softmax has no proposals or denoising, which are sigmoid's"
        if self.learned_content and self.query != "two_stage":
            yield "learned_content needs query: two_stage"
        if self.one_to_many is not None and self.query != "two_stage":
            yield "one_to_many needs query: two_stage, whose proposals it takes"
        if self.denoising is not None:
            if self.query not in ("mixed", "anchors"):
                yield "denoising needs query: mixed or anchors"
            elif self.denoising.contrastive != (self.query == "mixed"):
                yield "denoising.contrastive belongs to query: mixed, the plain kind to anchors"
            elif self.patterns:
                yield "denoising needs patterns: 0; its indicator takes the content's place"
