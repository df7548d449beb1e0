"""Configs of queries: where they come from, and what training adds to them.

A further kind is a class here, named in :data:`QueriesConfig`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from detr.config.base import Part, Strict


class DenoisingConfig(Strict):
    """What all denoising queries have in common (DN-DETR section 4).

    Attributes:
        label_noise: Probability that a label is replaced by a random one.
        box_noise: Scale of the box noise.
    """

    label_noise: Annotated[float, Field(ge=0, le=1)]
    box_noise: Annotated[float, Field(ge=0, le=100)]


class PlainDenoisingConfig(DenoisingConfig):
    """DN-DETR's: positives only, noise on center and size, an indicator in the content.

    Attributes:
        groups: Number of denoising groups.
    """

    groups: Annotated[int, Field(ge=1, le=10000)] = 5
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.2
    box_noise: Annotated[float, Field(ge=0, le=100)] = 0.4


class ContrastiveDenoisingConfig(DenoisingConfig):
    """DINO's (section 3.3): a negative beside every positive, noise on corners.

    Attributes:
        number: Budget of denoising positives, DINO's ``dn_number``.
        label_noise: DINO: 0.5 * 0.5.
        harder_negatives: A negative's corners move by one to two half sizes (DINO); otherwise no
            farther than a positive's (Stable-DINO's released config).
    """

    number: Annotated[int, Field(ge=1, le=100_000)] = 100
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.25
    box_noise: Annotated[float, Field(ge=0, le=100)] = 1.0
    harder_negatives: bool = True


class UnifiedDenoisingConfig(DenoisingConfig):
    """Mask DINO's (section 3.4): DN-DETR's positives, whose masks are repaired, too.

    Attributes:
        number: Budget of denoising queries of an image; a batch whose fullest image has more
            objects has none.
    """

    number: Annotated[int, Field(ge=1, le=100_000)] = 100
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.2
    box_noise: Annotated[float, Field(ge=0, le=100)] = 0.4


class OneToManyConfig(Strict):
    """A second group of queries that shares each ground-truth box, in training (H-DETR).

    Attributes:
        queries: Their number.
        repeat: How many of them each box is assigned to.
    """

    queries: Annotated[int, Field(ge=1, le=100_000)] = 1500
    repeat: Annotated[int, Field(ge=1, le=10000)] = 6


AnyDenoisingConfig = PlainDenoisingConfig | ContrastiveDenoisingConfig | UnifiedDenoisingConfig


class OwnQueriesConfig(Part):
    """What every kind of queries says about itself.

    Attributes:
        number: Number of object queries N of the detector's own group.
    """

    from_proposals: ClassVar[bool] = False
    """Whether the encoder's tokens propose them."""
    has_boxes: ClassVar[bool] = True
    """Whether their references are boxes and not bare centers."""
    learned_positions: ClassVar[bool] = False
    """Whether they bring a position of their own, instead of one made from the reference."""
    boxes_may_stay: ClassVar[bool] = False
    """Whether their boxes may be the references of all layers alike."""
    in_groups: ClassVar[bool] = False
    """Whether training has further groups that each find all objects."""
    predict_first: ClassVar[bool] = False
    """Whether the decoder's heads already answer what enters its first layer, in training."""

    number: Annotated[int, Field(ge=1, le=100_000)] = 300

    @property
    def total(self) -> int:
        """Number of queries that are decoded."""
        return self.number

    @property
    def has_places(self) -> bool:
        """Whether their references differ from each other before the first layer."""
        return True

    @property
    def zero_content(self) -> bool:
        """Whether all of them start without any content."""
        return False

    @property
    def starts_from_masks(self) -> bool:
        """Whether their first boxes are those around predicted masks."""
        return False

    @property
    def noise(self) -> AnyDenoisingConfig | None:
        """Of their denoising queries in training."""
        return None


class LearnedQueriesConfig(OwnQueriesConfig):
    """A learned position each, from which the reference follows.

    Attributes:
        reference: By a ``linear`` map (Deformable DETR), an ``mlp`` (Conditional DETR), or not at
            all: ``center``, all refer to the middle of the image (DETR).
        learned_content: The content is learned, too (Deformable DETR); otherwise zero.
    """

    has_boxes: ClassVar[bool] = False
    learned_positions: ClassVar[bool] = True

    kind: Literal["learned"] = "learned"
    reference: Literal["linear", "mlp", "center"] = "linear"
    learned_content: bool = True

    @property
    def has_places(self) -> bool:
        """See the base class."""
        return self.reference != "center"

    @property
    def zero_content(self) -> bool:
        """See the base class."""
        return not self.learned_content


class AnchorQueriesConfig(OwnQueriesConfig):
    """Learned boxes (DAB-DETR).

    Attributes:
        learned_content: One content is learned per anchor (DAB-Deformable-DETR).
        patterns: Otherwise each anchor is used with this many learned contents (0: content zero).
        random_centers: Centers start evenly spread over the image instead of normally around its
            middle.
        denoising: Denoising queries in training, or ``None``.
    """

    kind: Literal["anchors"] = "anchors"
    learned_content: bool = True
    patterns: Annotated[int, Field(ge=0, le=100)] = 0
    random_centers: bool = False
    denoising: PlainDenoisingConfig | None = None

    @model_validator(mode="after")
    def _one_content(self) -> AnchorQueriesConfig:
        if self.patterns and self.learned_content:
            raise ValueError("patterns take the place of content: set learned_content to false")
        if self.patterns and self.denoising is not None:
            raise ValueError("denoising needs patterns: 0; its indicator takes the content's place")
        return self

    @property
    def total(self) -> int:
        """See the base class."""
        return self.number * max(1, self.patterns)

    @property
    def zero_content(self) -> bool:
        """See the base class."""
        return not self.learned_content and self.patterns == 0

    @property
    def noise(self) -> PlainDenoisingConfig | None:
        """See the base class."""
        return self.denoising


class ProposedQueriesConfig(OwnQueriesConfig):
    """What queries from the encoder's proposals have in common.

    Attributes:
        proposal_tokens: Which tokens may propose: those ``inside`` the image, or ``all``, as in the
            original code, where those in the padding and at the edges compete with zero content.
    """

    from_proposals: ClassVar[bool] = True

    proposal_tokens: Literal["inside", "all"] = "inside"

    @property
    def projects_tokens(self) -> bool:
        """Whether tokens are projected and normed before they are judged."""
        return True


class TwoStageQueriesConfig(ProposedQueriesConfig):
    """Position and content come from the proposals (Deformable DETR, two-stage).

    Attributes:
        learned_content: The content comes from an embedding instead (H-DETR).
        one_to_many: Queries that share boxes in training (H-DETR), or ``None``.
    """

    kind: Literal["two_stage"] = "two_stage"
    learned_content: bool = False
    one_to_many: OneToManyConfig | None = None


class MixedQueriesConfig(ProposedQueriesConfig):
    """DINO's: anchors from proposals, learned content.

    Attributes:
        denoising: Denoising queries in training, or ``None``.
    """

    kind: Literal["mixed"] = "mixed"
    denoising: ContrastiveDenoisingConfig | None = None

    @property
    def noise(self) -> ContrastiveDenoisingConfig | None:
        """See the base class."""
        return self.denoising


class SelectedQueriesConfig(ProposedQueriesConfig):
    """RT-DETR's: anchors from proposals, content from the tokens that propose them.

    Attributes:
        position_layers: Linear layers of the network that makes positions of boxes; two are twice
            as wide within (DEIM on RT-DETRv2: 3).
        position_limit: Largest size of a position's channels (D-FINE: 10), or ``None``.
        positions_stay: Every layer has the positions of the anchors instead of those of the boxes
            it starts from (DEIMv2).
        projected: Tokens are projected and normed before they are judged (DEIMv2: not).
        denoising: Denoising queries in training, or ``None``.
    """

    kind: Literal["selected"] = "selected"
    position_layers: Literal[2, 3] = 2
    position_limit: Annotated[float, Field(gt=0, le=1e6)] | None = None
    positions_stay: bool = False
    projected: bool = True
    denoising: ContrastiveDenoisingConfig | None = None

    @property
    def projects_tokens(self) -> bool:
        """See the base class."""
        return self.projected

    @property
    def noise(self) -> ContrastiveDenoisingConfig | None:
        """See the base class."""
        return self.denoising


class GroupedQueriesConfig(ProposedQueriesConfig):
    """LW-DETR's: boxes moved off the proposals, content learned, further groups in training.

    Every group has contents, steps off its proposals and proposal heads of its own, and each is
    matched with all objects (Group DETR, Chen et al. 2023). What answers is the first.

    Attributes:
        groups: Their number in training, the one that answers included.
    """

    boxes_may_stay: ClassVar[bool] = True
    in_groups: ClassVar[bool] = True

    kind: Literal["grouped"] = "grouped"
    groups: Annotated[int, Field(ge=1, le=100)] = 13


class UnifiedQueriesConfig(ProposedQueriesConfig):
    """Mask DINO's (section 3.3): content and anchors from tokens that the decoder's heads judge.

    Attributes:
        initial_boxes: Where anchors come from: the boxes that the box head ``predicted``, or those
            around the masks that the mask head did, by whole cells (``bitmask``) or between the
            first and the last cell (``mask2box``), which is the published codes' faster way.
        coarse_to_fine: A token's default box is the smaller the coarser its level, as in the
            published weights whose ``FEATURE_ORDER`` is ``low2high``.
        denoising: Denoising queries in training, or ``None``.
    """

    predict_first: ClassVar[bool] = True

    kind: Literal["unified"] = "unified"
    initial_boxes: Literal["predicted", "bitmask", "mask2box"] = "bitmask"
    coarse_to_fine: bool = False
    denoising: UnifiedDenoisingConfig | None = None

    @property
    def starts_from_masks(self) -> bool:
        """See the base class."""
        return self.initial_boxes != "predicted"

    @property
    def noise(self) -> UnifiedDenoisingConfig | None:
        """See the base class."""
        return self.denoising


QueriesConfig = Annotated[
    LearnedQueriesConfig
    | AnchorQueriesConfig
    | TwoStageQueriesConfig
    | MixedQueriesConfig
    | SelectedQueriesConfig
    | GroupedQueriesConfig
    | UnifiedQueriesConfig,
    Field(discriminator="kind"),
]
