"""Parity budgets: the defaults per precision, and a user's own from a file.

Two engines that compute in float32 differ in the order of their sums, nothing else, so FP32's
budget is a few thousand roundings wide. FP16 and INT8 really compute something else: there AP
decides, single detections may come and go at the threshold, and the medians catch what moves every
box or every score a little. Their figures are what a trained detector was measured to lose, times
two to eight, boxes also times four because they are meant for images four times as wide as those it
was measured on (docs/gate.md).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from detr.errors import UserError
from engines.parity import Budget

DEFAULTS = {
    "fp32": Budget(),
    "fp16": Budget(
        score=0.15,
        score_median=0.005,
        box_px=10.0,
        box_px_median=0.1,
        missing=0.01,
        extra=0.01,
        class_flips=0.005,
        ap=0.002,
        mask_iou=0.8,
        mask_iou_median=0.99,
    ),
    "int8": Budget(
        score=0.4,
        score_median=0.03,
        box_px=30.0,
        box_px_median=1.0,
        missing=0.02,
        extra=0.02,
        class_flips=0.01,
        ap=0.01,
        mask_iou=0.1,
        mask_iou_median=0.95,
    ),
}


def default_budget(precision: str) -> Budget:
    """The budget of a bundle's precision: ``fp32``, ``fp16`` or ``int8``."""
    return DEFAULTS[precision]


def read_budget(path: Path, precision: str) -> Budget:
    """Reads a YAML or JSON mapping; what it does not name keeps the precision's default.

    Raises:
        UserError: ``budget-file`` (missing, not a mapping), ``budget-key`` (misspelt) or
            ``budget-value``; each names the file and the key.
    """
    given = _mapping(path)
    known = Budget.model_fields
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError("budget-key", f"{path}: no budget is called {key!r}; {hint}")
    try:
        return Budget.model_validate(default_budget(precision).model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            "budget-value", f"{path}: {first['loc'][0]}: {first['msg']}, not {first['input']!r}"
        ) from error


def _mapping(path: Path) -> dict[str, Any]:
    try:
        # JSON is YAML, too.
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("budget-file", f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            "budget-file", f"{path}: neither YAML nor JSON: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(given, dict):
        raise UserError("budget-file", f"{path}: a budget is a mapping such as 'box_px: 0.5'")
    return given
