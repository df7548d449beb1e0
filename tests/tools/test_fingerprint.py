"""The comparison that proves a move: equal is 0, one digit of one AP is 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import fingerprint

REPORT = Path(__file__).resolve().parents[1] / "bench/recorded/report_format1.json"


def outcome(monkeypatch: pytest.MonkeyPatch, *options: object) -> object:
    monkeypatch.setattr(sys, "argv", ["fingerprint", "--report", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        fingerprint.main()
    return stopped.value.code


def test_the_ap_of_a_report_is_compared_to_the_last_digit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before.json"
    assert outcome(monkeypatch, REPORT, "--out", before, "--against", before) == 0
    assert capsys.readouterr().out == "2 of 2 equal\n"
    changed = json.loads(before.read_text())
    changed["student"]["kitti"]["per_class"]["Car"]["hard"]["ap40"] += 1e-15
    before.write_text(json.dumps(changed))
    assert outcome(monkeypatch, REPORT, "--against", before) == 1
    assert capsys.readouterr().out == "1 of 2 equal\n  student\n"
