"""Deployments that run the graph alone, without what our engines do after it."""

from __future__ import annotations

from detr.errors import UserError
from engines.bundle import Bundle


def check_graph_alone(bundle: Bundle, what: str) -> None:
    """Refuses a model whose detections are more than its graph's outputs.

    Args:
        bundle: To be deployed.
        what: That runs the graph, for the message.

    Raises:
        UserError: ``deploy-nms``.
    """
    nms = bundle.info.model.nms
    if nms is not None:
        raise UserError(
            "deploy-nms",
            f"{bundle.path}: the model drops duplicates after the graph (detector.nms: {nms:g}), "
            f"which {what} does not; set it to null in the checkpoint's .json and export again",
        )


def check_boxes_alone(bundle: Bundle, what: str) -> None:
    """Refuses a model with masks where only boxes would arrive.

    Args:
        bundle: To be deployed.
        what: That reads boxes alone, for the message.

    Raises:
        UserError: ``deploy-masks``.
    """
    if bundle.info.masks is not None:
        raise UserError(
            "deploy-masks",
            f"{bundle.path}: the model finds masks, which {what} does not read; deploy it with "
            "detr export triton or detr export cpp, or train one without heads.masks",
        )
