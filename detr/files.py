"""Writing files so that a full disk or an interrupted run never costs what was there before."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from pathlib import Path

from detr.errors import UserError

# Of files people write: Windows editors put a byte order mark before the first word.
TEXT = "utf-8-sig"

# The names :func:`write_atomic` gives while it writes.
_LEFTOVER = re.compile(r"\..+\.(?:json|jsonl|pt|safetensors|yaml)\.[a-z0-9_]{8}")

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def output_error(path: Path, error: OSError) -> UserError:
    """The one-line error for a failed write to ``path``."""
    if error.errno in _NO_SPACE:
        return UserError(
            "disk-full", f"{path}: no space left while writing; what was there before is unchanged"
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UserError("output-unwritable", f"{path}: a file is in the way of a folder")
    return UserError("output-unwritable", f"{path}: {error.strerror or error}")


def output_folder(path: Path) -> None:
    """Makes a folder and writes into it, before the time goes into what is to lie there.

    Raises:
        UserError: ``disk-full`` or ``output-unwritable``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")
    except OSError as error:
        raise output_error(path, error) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces ``path`` by ``data`` in one step; text is UTF-8.

    The data goes to a temporary file in the same folder, is flushed to the disk and then renamed,
    so a reader sees the old content or the new one and a failure leaves the old one.

    Raises:
        UserError: ``disk-full`` or ``output-unwritable``.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result is for everyone the folder is for.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise output_error(path, error) from error


def drop_leftovers(folder: Path) -> None:
    """Removes what a process that was killed within :func:`write_atomic` left in its own folder."""
    for file in folder.glob(".*"):
        if _LEFTOVER.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
