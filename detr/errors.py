"""The errors a user can cause, each with a stable code.

A mistake in a file, a flag or a recipe is the user's to mend, so it is reported in one line that
names the place, and never as a traceback. Anything that is *not* a :class:`UserError` is a defect
of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """A mistake of the user's, told in one line.

    Args:
        code: Stable, lower-case, hyphenated (``kitti-label-columns``); listed in
            ``docs/errors.md``.
        message: One line that names the file and place and says what to do about it.
    """

    exit_status = 2

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.message}"


class GateError(UserError):
    """A result that misses a budget the user set (AP, latency, parity): exit status 3."""

    exit_status = 3


def first_problem(error: ValidationError) -> str:
    """Place and reason of what is wrong with a file's content, in one line.

    A format of another release comes first, since all else follows from it; then a misspelt key,
    before the key that is missing because of it.
    """
    found = error.errors()
    for one in found:
        if one["loc"] == ("format",) and one["type"] == "literal_error":
            return f"format {one['input']} is another release's; update detr-distillery"
    first = min(found, key=lambda one: one["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"]) or "file"
    reason = "no such key" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{place}: {reason}"
