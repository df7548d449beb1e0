"""Error codes are stable and documented: docs/errors.md lists exactly those the source raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from detr.errors import GateError

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("detr", "engines", "bench", "export", "distill")


def codes_in_source() -> set[str]:
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                # Made on the spot, or by a class of its own.
                if (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func) in {"UserError", "GateError", "super().__init__"}
                    and node.args
                ):
                    first = node.args[0]
                    if isinstance(first, ast.Constant) and isinstance(first.value, str):
                        found.add(first.value)
    return found


def test_documented_codes_are_the_raised_ones() -> None:
    documented = set(
        re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/errors.md").read_text(), re.M)
    )
    raised = codes_in_source()
    assert raised, "no error codes found: has the way they are raised changed?"
    assert documented - raised == set(), "documented but never raised"
    assert raised - documented == set(), "raised but not documented"


def test_codes_are_lower_case_words() -> None:
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in codes_in_source())


def test_what_a_file_calls_a_key_breaks_no_line() -> None:
    error = GateError("bundle-sidecar", "größe.\x00\nA\ud800\t: no such key")
    assert error.message == "größe.\\x00\\nA\\ud800\\t: no such key"
    assert str(error).encode() and str(error).count("\n") == 0
