"""Export of a model at the papers' sizes: a bundle for landscape and one for portrait images.

Two graphs and not one with an open canvas: each is measured, proved and built as any other bundle
is, and in both runtimes they are faster (docs/performance.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from detr.models import load_model
from detr.types import ImageArray
from engines.bundle import ORIENTATIONS, Bundle
from engines.msda_function import Lowering
from engines.oriented import open_bundles
from export.bundle import RejectedExport, export_bundle, refuse_output, replacing
from export.precision.apply import PrecisionRequest


def export_bundles(
    checkpoint: Path,
    out: Path,
    opset: int = 17,
    batch: int | Literal["dynamic"] = 1,
    lowering: Lowering = "gridsample",
    images: Sequence[ImageArray] | None = None,
    request: PrecisionRequest | None = None,
    gate: bool = True,
) -> list[Bundle]:
    """Exports a checkpoint for every canvas it needs.

    Args:
        checkpoint: ``NAME.safetensors`` or a run directory.
        out: The bundle's folder; for a model at the papers' sizes the folder of its two bundles.
        opset: See :func:`export.bundle.export_bundle`.
        batch: Likewise.
        lowering: Likewise.
        images: Golden images; each goes to the canvas it is meant for. Drawn ones where ``None``,
            or for a canvas that none is meant for.
        request: Precision of the graphs.
        gate: Whether they have to pass the parity gate.

    Returns:
        The bundle, or those for landscape and for portrait images.

    Raises:
        RejectedExport: One of them was rejected; none takes the name ``out``.
        UserError: What :func:`export.bundle.export_bundle` raises.
    """
    refuse_output(out)
    preprocess = load_model(checkpoint)[1].preprocess
    request = request or PrecisionRequest()
    if len(preprocess.canvases) == 1:
        return [export_bundle(checkpoint, out, opset, batch, lowering, images, request, gate)]
    with replacing(out) as folder:
        for name, canvas in zip(ORIENTATIONS, preprocess.canvases, strict=True):
            placed = preprocess.on(canvas)
            mine, typical = (
                [image for image in some if placed.meant_for(*image.shape[:2])]
                for some in (images or (), request.calibration)
            )
            wanted = replace(request, calibration=typical or request.calibration)
            place = folder / name
            try:
                export_bundle(
                    checkpoint, place, opset, batch, lowering, mine or None, wanted, gate, canvas
                )
            except RejectedExport as error:
                kept = out.with_name(f"{out.name.removesuffix('.bundle')}.rejected.bundle")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(error.bundle.path, kept)
                raise RejectedExport(Bundle(kept, error.bundle.info), error.verdict, out) from None
    return open_bundles(out)
