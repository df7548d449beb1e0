"""The errors a user can cause, each with a stable code.

A mistake in a file, a flag or a recipe is the user's to mend, so it is reported in one line that
names the place, and never as a traceback. Anything that is *not* a :class:`UserError` is a defect
of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's, told in one line.

    Args:
        code: Stable, lower-case, hyphenated (``kitti-label-columns``); listed in
            ``docs/errors.md``.
        message: One line that names the file and place and says what to do about it. Names come
            from files of any content: what cannot be printed is escaped.
    """

    exit_status = 2

    def __init__(self, code: str, message: str) -> None:
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.message}"


class GateError(UserError):
    """A result that misses a budget the user set (AP, latency, parity): exit status 3."""

    exit_status = 3
