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
