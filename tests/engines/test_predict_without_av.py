"""A video without PyAV names the extra before anything is computed."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from detr.errors import UserError
from engines.predict.sources import find_sources


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "clip.mp4").write_bytes(b"0")
    with pytest.raises(UserError, match=r"detr-distillery\[video\]") as caught:
        find_sources([tmp_path])
    assert caught.value.code == "extra-missing"
