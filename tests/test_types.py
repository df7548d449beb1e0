"""Detections as other libraries want them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from detr.errors import UserError
from detr.types import Detections

FOUND = Detections(
    boxes=np.array([[1, 2, 30, 40], [5, 6, 7, 8]], np.float32),
    scores=np.array([0.9, 0.4], np.float32),
    labels=np.array([2, 0], np.int64),
)
NAMES = ("Car", "Van", "Cyclist")


@dataclass
class StandIn:
    """The constructor of ``supervision.Detections`` as of 0.31, as far as we use it."""

    xyxy: npt.NDArray[Any]
    mask: object = None
    confidence: npt.NDArray[Any] | None = None
    class_id: npt.NDArray[Any] | None = None
    tracker_id: object = None
    data: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)


@pytest.fixture(params=["stand-in", "installed"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "installed":
        pytest.importorskip("supervision")
        return
    module = ModuleType("supervision")
    module.Detections = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", module)


def test_supervision_gets_boxes_scores_labels_and_names(library: None) -> None:
    given = FOUND.to_supervision(NAMES)
    assert given.xyxy.tolist() == [[1, 2, 30, 40], [5, 6, 7, 8]]
    assert given.confidence is not None and given.confidence.tolist() == FOUND.scores.tolist()
    assert given.class_id is not None and given.class_id.tolist() == [2, 0]
    assert given.data["class_name"].tolist() == ["Cyclist", "Car"]
    assert "class_name" not in FOUND.to_supervision().data


def test_supervision_gets_an_image_without_detections(library: None) -> None:
    given = FOUND.above(0.95).to_supervision(NAMES)
    assert given.xyxy.shape == (0, 4) and given.data["class_name"].shape == (0,)


def test_without_supervision_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install 'detr-distillery\[supervision\]'") as error:
        FOUND.to_supervision()
    assert error.value.code == "extra-missing"
