"""How far an engine's detections are from its reference's, and how far they may be.

These models are part of ``bundle.json`` and ``evidence.json``; the comparison itself is in
:mod:`export.parity`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from detr.config import Record

# Share of detections below the threshold that may differ.
_DOUBTFUL = 0.25
# What a larger number makes narrower.
_AT_LEAST = ("detections", "best", "mask_iou", "mask_iou_median")
_SHARES = ("missing", "extra", "class_flips")


def _stored_figure(value: Any) -> Any:
    return float("inf") if value is None else value


# A difference. Files of format 1 have null where it was infinite.
Figure = Annotated[float, BeforeValidator(_stored_figure)]


class Measured(Record):
    """Base of models with measured figures: JSON keeps their infinities and NaN, as strings."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


def without_none(plain: SerializerFunctionWrapHandler, model: Any) -> dict[str, Any]:
    """What a model says, but for what it says nothing of: files of boxes alone stay as they were.

    Args:
        plain: Serializes it as ever.
        model: With the figures of masks among its fields.
    """
    content: dict[str, Any] = plain(model)
    return {key: value for key, value in content.items() if value is not None}


class Budget(Measured):
    """How far apart two engines may be.

    Attributes:
        threshold: Score from which a detection counts.
        detections: The reference must find this many above the threshold over all images, or there
            is nothing to judge by.
        best: Where it finds fewer, this many of the best of each image are compared.
        score, box_px: Largest difference of a matched score, and of a matched box coordinate in
            pixels of the original image.
        score_median, box_px_median: Largest median of the same over all matches: a shift of every
            box is seen here long before it is seen in the maximum.
        missing, extra, class_flips: Share of the reference's detections that may be gone, new or of
            another class.
        mask_iou: Least IoU of a matched mask with the reference's, in pixels of the original image;
            ``None``, as ``mask_iou_median``, where there are no masks to judge.
        mask_iou_median: Least median of the same over all matches.
        ap: Largest difference of COCO AP, where the images have labels.
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.3
    detections: Annotated[int, Field(ge=1)] = 10
    best: Annotated[int, Field(ge=0)] = 10
    score: Annotated[float, Field(ge=0)] = 0.01
    score_median: Annotated[float, Field(ge=0)] = 1e-4
    box_px: Annotated[float, Field(ge=0)] = 0.5
    box_px_median: Annotated[float, Field(ge=0)] = 0.02
    missing: Annotated[float, Field(ge=0, le=1)] = 0.0
    extra: Annotated[float, Field(ge=0, le=1)] = 0.0
    class_flips: Annotated[float, Field(ge=0, le=1)] = 0.0
    ap: Annotated[float, Field(ge=0, le=1)] = 0.0005
    mask_iou: Annotated[float, Field(ge=0, le=1)] | None = 0.9
    mask_iou_median: Annotated[float, Field(ge=0, le=1)] | None = 0.999

    @model_serializer(mode="wrap")
    def _without_masks(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(plain, self)

    def of_boxes(self) -> Budget:
        """What is said of masks left out, for a detector that finds none."""
        return self.model_copy(update={"mask_iou": None, "mask_iou_median": None})

    def wider_than(self, usual: Budget) -> list[str]:
        """One line where this budget allows more than the usual one; empty where it does not."""
        # Masks that are not judged may be anything.
        fields = {
            name: (getattr(self, name) or 0.0, getattr(usual, name) or 0.0)
            for name in Budget.model_fields
        }
        wider = [
            f"{name} {own:g} (usually {other:g})"
            for name, (own, other) in fields.items()
            if (own < other if name in _AT_LEAST else own > other)
        ]
        return [f"by a budget wider than the usual one: {', '.join(wider)}"] if wider else []

    def for_doubtful(self) -> Budget:
        """What is allowed among detections no one would act on.

        There proposals of nearly equal scores trade places even between two healthy runtimes, so
        only what concerns most of them counts.
        """
        return self.model_copy(
            update={
                "score": 1.0,
                "box_px": float("inf"),
                "mask_iou": None if self.mask_iou is None else 0.0,
                **{name: max(getattr(self, name), _DOUBTFUL) for name in _SHARES},
            }
        )


class Parity(Measured):
    """How far a candidate's detections are from the reference's.

    Attributes:
        images: Number of images compared.
        detections: What the reference finds above the threshold.
        matched: Detections found by both, one to one by class and overlap.
        missing: Detections of the reference the candidate lacks.
        extra: Detections of the candidate the reference lacks.
        class_flips: Detections at the same place with another class.
        not_finite: Detections of the candidate with a NaN or an infinity.
        short: Images with another number of rows, whatever their scores: a list cut short.
        max_box_px, median_box_px: Coordinate difference of a matched box (the largest of its four),
            pixels of the original image.
        max_score, median_score: Score difference of a match.
        min_mask_iou, median_mask_iou: IoU of a match's mask with the reference's, where the
            reference has masks; two empty ones agree.
        worst_image: Index of the image with the largest deviation.
        deviating: Images on which something exceeds the budget by itself, worst first.
    """

    images: int = 0
    detections: int = 0
    matched: int = 0
    missing: int = 0
    extra: int = 0
    class_flips: int = 0
    not_finite: int = 0
    short: int = 0
    max_box_px: Figure = 0.0
    median_box_px: Figure = 0.0
    max_score: Figure = 0.0
    median_score: Figure = 0.0
    worst_image: int = 0
    deviating: tuple[int, ...] = ()
    min_mask_iou: Figure | None = None
    median_mask_iou: Figure | None = None

    @model_serializer(mode="wrap")
    def _without_masks(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(plain, self)

    def violations(self, budget: Budget) -> list[str]:
        """What exceeds the budget, one phrase each; empty where nothing does."""
        if self.detections < budget.detections:
            budget = budget.for_doubtful()
        expected = self.matched + self.missing + self.class_flips
        counts = (
            ("missing detections", self.missing, budget.missing),
            ("extra detections", self.extra, budget.extra),
            ("class flips", self.class_flips, budget.class_flips),
            ("detections that are no numbers", self.not_finite, 0.0),
            ("images with another number of rows", self.short, 0.0),
        )
        differences = (
            ("px box difference", self.max_box_px, budget.box_px),
            ("px median box difference", self.median_box_px, budget.box_px_median),
            ("score difference", self.max_score, budget.score),
            ("median score difference", self.median_score, budget.score_median),
        )
        reasons = [
            f"{count} {what} (of {expected} detections; at most {share * expected:.3g})"
            for what, count, share in counts
            if count > share * expected
        ]
        agreements = (
            ("IoU of a mask", self.min_mask_iou, budget.mask_iou),
            ("median IoU of masks", self.median_mask_iou, budget.mask_iou_median),
        )
        # Written so that a NaN is over every budget.
        reasons += [
            f"{value:.4g} {what} (at most {most:g})"
            for what, value, most in differences
            if not value <= most
        ]
        return reasons + [
            f"{value:.4g} {what} (at least {least:g})"
            for what, value, least in agreements
            if value is not None and least is not None and not value >= least
        ]

    def summary(self) -> str:
        """One line for a person."""
        return (
            f"{self.matched} detections on {self.images} images ({self.detections} above the "
            "threshold): "
            f"boxes within {self.max_box_px:.2g} px (median {self.median_box_px:.2g}), "
            f"scores within {self.max_score:.2g} (median {self.median_score:.2g}), "
            f"{self.missing} missing, {self.extra} extra, {self.class_flips} class flips"
            + self._masks()
        )

    def _masks(self) -> str:
        if self.min_mask_iou is None or self.median_mask_iou is None:
            return ""
        return f", mask IoU from {self.min_mask_iou:.4f} (median {self.median_mask_iou:.4f})"


class Outcome(Measured):
    """Everything a budget speaks of.

    Attributes:
        parity: The comparison of the detections.
        ap, reference_ap: COCO AP of candidate and reference; ``None`` where there are no labels.
    """

    parity: Parity
    ap: float | None = None
    reference_ap: float | None = None

    def violations(self, budget: Budget) -> list[str]:
        """What exceeds the budget, one phrase each; empty where nothing does."""
        reasons = self.parity.violations(budget)
        if self.ap is None or self.reference_ap is None:
            return reasons
        # Written so that a NaN is over every budget.
        if not abs(self.ap - self.reference_ap) <= budget.ap:
            reasons.append(
                f"AP {self.ap:.4f} instead of {self.reference_ap:.4f} (at most {budget.ap:g} apart)"
            )
        return reasons

    def summary(self) -> str:
        """One line for a person."""
        if self.ap is None or self.reference_ap is None:
            return self.parity.summary()
        return f"{self.parity.summary()}, AP {self.ap - self.reference_ap:+.4f}"
