"""What a detector is made of: one validated, frozen config for every architecture.

Torch-free on purpose: a bundle's sidecar carries this config to targets that have no torch.
"""

from __future__ import annotations

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
        frozen_stages: How many leading stages (stem, stage 1, ...) take no gradient.
    """

    name: str = "resnet50"
    strides: tuple[int, ...] = (8, 16, 32)
    norm: Literal["frozen", "train"] = "train"
    pretrained: str | None = None
    options: dict[str, Any] = {}
    frozen_stages: Annotated[int, Field(ge=0)] = 0

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Tuples become lists, so that a config equals itself after a trip through JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


class DenoisingConfig(Strict):
    """Denoising queries (DN-DETR; contrastive: DINO section 3.3).

    Attributes:
        number: Budget of denoising positives; DINO's ``dn_number``.
        label_noise: Probability that a label is replaced by a random one (DINO: 0.5 * 0.5).
        box_noise: Scale of the corner noise (DINO: 1.0).
    """

    number: Annotated[int, Field(ge=1)] = 100
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.25
    box_noise: Annotated[float, Field(ge=0)] = 1.0


class DetectorConfig(Strict):
    """A deformable detection transformer.

    Attributes:
        num_classes: Number of foreground classes K.
        levels: Number of feature levels V; levels beyond the backbone's maps are stride-2 convs.
        width, heads, points: Model width D, attention heads M, sampling points P per head and
            level.
        ffn: Hidden width of the feed-forward networks.
        encoder_layers, decoder_layers: Depths; 0 encoder layers hand the projected maps to the
            decoder.
        queries: Number of object queries N of the detector's own group.
        query: ``learned`` (Deformable DETR: 2 x D embedding, reference = linear of the positional
            half), ``two_stage`` (position and content from the encoder's proposals) or ``mixed``
            (DINO: anchors from proposals, learned content).
        refine: ``none`` (fixed references, shared heads), ``detach`` (iterative refinement) or
            ``look_forward_twice`` (DINO section 3.5).
        shared_heads: One class and one box head for all decoder layers (official DINO) instead of a
            copy per layer.
        denoising: Contrastive denoising in training, or ``None``.
        pe_temperature, pe_offset: Of the 2-D sine embedding of the image plane.
        detections: How many (query, class) pairs the post-processing keeps.
    """

    num_classes: Annotated[int, Field(ge=1)]
    backbone: BackboneConfig = BackboneConfig()
    levels: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=8)] = 256
    heads: Annotated[int, Field(ge=1)] = 8
    points: Annotated[int, Field(ge=1)] = 4
    ffn: Annotated[int, Field(ge=1)] = 1024
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    encoder_layers: Annotated[int, Field(ge=0)] = 6
    decoder_layers: Annotated[int, Field(ge=1)] = 6
    queries: Annotated[int, Field(ge=1)] = 300
    query: Literal["learned", "two_stage", "mixed"] = "learned"
    refine: Literal["none", "detach", "look_forward_twice"] = "none"
    shared_heads: bool = False
    denoising: DenoisingConfig | None = None
    pe_temperature: float = 10000.0
    pe_offset: float = -0.5
    detections: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _consistent(self) -> DetectorConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4 (2-D sine embedding)")
        if self.levels < len(self.backbone.strides):
            raise ValueError(
                f"levels {self.levels} is less than the backbone's "
                f"{len(self.backbone.strides)} maps"
            )
        if self.denoising is not None and self.query != "mixed":
            raise ValueError("denoising needs query: mixed (anchors and label embeddings)")
        if self.query != "learned" and self.refine == "none":
            raise ValueError(
                f"query: {self.query} starts from boxes and needs refine: detach or "
                "look_forward_twice"
            )
        return self
