"""Configs of prediction heads.

A further kind of class head is named in :data:`ClassesConfig`, of boxes in :data:`AnyBoxesConfig`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from detr.config.base import Part, Strict, usual_kind


class SigmoidClassesConfig(Strict):
    """A score per class, each independent of the others (focal loss)."""

    no_object: ClassVar[bool] = False
    """Whether a last logit says "no object"."""

    kind: Literal["sigmoid"] = "sigmoid"


class SoftmaxClassesConfig(Strict):
    """Classes that exclude each other and "no object" (DETR)."""

    no_object: ClassVar[bool] = True

    kind: Literal["softmax"] = "softmax"


ClassesConfig = Annotated[SigmoidClassesConfig | SoftmaxClassesConfig, Field(discriminator="kind")]


class BoxesConfig(Part):
    """Boxes as offsets from a reference, in logits.

    Attributes:
        logit_eps: How near to 0 and 1 a reference may come before its logit is taken (Deformable
            DETR 1e-5; DAB-DETR, DN-DETR and DINO 1e-3, which keeps boxes away from the edges).
    """

    kind: Literal["offset"] = "offset"
    logit_eps: Annotated[float, Field(gt=0, lt=0.01)] = 1e-5


class ScaledBoxesConfig(Part):
    """Boxes as steps from a reference, in parts of its size (LW-DETR's ``bbox_reparam``).

    A center moves by parts of the width and height, these are multiplied by an exponential.
    """

    logit_eps: ClassVar[float] = 1e-5
    """Of what still has logits, such as denoising."""

    kind: Literal["scaled"] = "scaled"


AnyBoxesConfig = Annotated[
    BoxesConfig | ScaledBoxesConfig, Field(discriminator="kind"), usual_kind("offset")
]


class MasksConfig(Strict):
    """Instance masks as dot products of queries and pixels (Mask DINO, section 3.2).

    Pixels are the cells of a map of stride 4, made of the backbone's map of that stride and the
    encoder's finest one.

    Attributes:
        width: Channels of a pixel and of what a query says of its mask.
        channels: Of the convolution that joins both maps; ``None`` for the detector's width.
        weigh_scores: A detection's score is that of its class times the mean probability within
            its mask (Mask DINO's evaluation).
    """

    width: Annotated[int, Field(ge=4, le=8192)] = 256
    channels: Annotated[int, Field(ge=8, le=8192)] | None = None
    weigh_scores: bool = False


class HeadsConfig(Strict):
    """What is said of each query.

    Attributes:
        classes: Class scores.
        boxes: Boxes.
        masks: Instance masks, or ``None`` for a detector of boxes alone.
    """

    classes: ClassesConfig = SigmoidClassesConfig()
    boxes: AnyBoxesConfig = BoxesConfig()
    masks: MasksConfig | None = None
