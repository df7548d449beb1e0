"""Signed bundles: whose a bundle and its engines are, and that nobody changed them since.

Hashes tell of damage; who can replace a file can replace its hash. ``signature.json`` lies in the
bundle and names every other file in it, engines and their evidence included, with its hash, under
one Ed25519 signature (RFC 8032). A bundle without one stays usable where nobody asks for one; where
``DETR_TRUSTED_KEY`` names a public key, no bundle is opened that is not signed with it.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from detr.config import Strict
from detr.errors import GateError, UserError
from detr.files import sha256, write_atomic
from detr.sidecar import SidecarError, read_sidecar

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE = "signature.json"
TRUSTED_KEY = "DETR_TRUSTED_KEY"

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Signed(Strict):
    """What is signed.

    Attributes:
        format: Version of this file.
        key: The raw public key, hexadecimal.
        files: SHA-256 of every file in the bundle but this one, by path inside the folder.
    """

    format: Literal[1] = 1
    key: _Sha256
    files: dict[str, _Sha256]

    def message(self) -> bytes:
        """The very bytes that are signed."""
        return self.model_dump_json().encode()


class Signature(Strict):
    """The file ``signature.json``.

    Attributes:
        signed: What is signed.
        signature: Of :meth:`Signed.message`, hexadecimal.
    """

    signed: Signed
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def text(self) -> str:
        """The content of the file; no other text that means the same is accepted."""
        return self.model_dump_json(indent=1) + "\n"


def sign(folder: Path, key: Path) -> Signature:
    """Signs everything in a bundle as it is now, and writes the signature into it.

    Args:
        folder: The bundle.
        key: A private Ed25519 key in PEM.

    Raises:
        UserError: ``key-unreadable``, ``signing-missing``, or the folder is not writable.
    """
    private = _private_key(key)
    files = dict(sorted(_files(folder).items()))
    signed = Signed(key=private.public_key().public_bytes_raw().hex(), files=files)
    made = Signature(signed=signed, signature=private.sign(signed.message()).hex())
    write_atomic(folder / SIGNATURE, made.text())
    return made


def check(folder: Path, key: Path) -> Signature:
    """Checks that a bundle is as the owner of a key signed it.

    Args:
        folder: The bundle.
        key: The public Ed25519 key in PEM that it has to be signed with.

    Raises:
        GateError: ``signature-missing`` (it is not signed), ``signature-invalid`` (the signature is
            damaged, or another key's) or ``signature-changed`` (a file was changed, added or taken
            away since).
        UserError: ``bundle-missing``, ``key-unreadable`` or ``signing-missing``.
    """
    if not folder.is_dir():
        raise UserError("bundle-missing", f"{folder}: no such bundle folder")
    public = _public_key(key)
    path = folder / SIGNATURE
    if not path.is_file():
        raise GateError(
            "signature-missing", f"{folder}: not signed; its owner signs it with: detr export sign"
        )
    found = _verified(path, public, key)
    here = _files(folder)
    for name in sorted(here.keys() | found.signed.files.keys()):
        if here.get(name) != found.signed.files.get(name):
            what = "gone" if name not in here else "changed"
            what = "added" if name not in found.signed.files else what
            raise GateError("signature-changed", f"{folder / name}: {what} since it was signed")
    return found


def check_trusted(folder: Path) -> None:
    """Checks a bundle's signature where ``DETR_TRUSTED_KEY`` asks for one; else does nothing.

    Raises:
        GateError, UserError: As :func:`check`.
    """
    trusted = os.environ.get(TRUSTED_KEY)
    if trusted:
        check(folder, Path(trusted))


def _verified(path: Path, public: Ed25519PublicKey, key: Path) -> Signature:
    from cryptography.exceptions import InvalidSignature

    try:
        found = read_sidecar(path, Signature)
        text = path.read_text(encoding="utf-8")
    except (SidecarError, UnicodeDecodeError) as error:
        raise GateError("signature-invalid", f"{path}: {error}") from error
    if found.text() != text:
        raise GateError("signature-invalid", f"{path}: not the file that was written")
    if found.signed.key != public.public_bytes_raw().hex():
        raise GateError("signature-invalid", f"{path}: signed with another key than {key}")
    try:
        public.verify(bytes.fromhex(found.signature), found.signed.message())
    except InvalidSignature as error:
        raise GateError(
            "signature-invalid", f"{path}: the signature is not that of its content"
        ) from error
    return found


def _files(folder: Path) -> dict[str, str]:
    """Hash of every file in a bundle but the signature itself."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and path != folder / SIGNATURE
    }


def _private_key(path: Path) -> Ed25519PrivateKey:
    from_pem = _cryptography().load_pem_private_key
    try:
        key = from_pem(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, "private", error) from error
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not isinstance(key, Ed25519PrivateKey):
        raise _unreadable(path, "private", ValueError("a key of another kind"))
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    from_pem = _cryptography().load_pem_public_key
    try:
        key = from_pem(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, "public", error) from error
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(key, Ed25519PublicKey):
        raise _unreadable(path, "public", ValueError("a key of another kind"))
    return key


def _unreadable(path: Path, half: str, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else "no such key in it"
    way = "openssl genpkey -algorithm ed25519 -out KEY"
    if half == "public":
        way = "openssl pkey -in KEY -pubout -out PUBLIC"
    elif isinstance(error, TypeError):
        reason = "protected by a passphrase"
    return UserError(
        "key-unreadable", f"{path}: {reason}; a {half} Ed25519 key in PEM is made with: {way}"
    )


def _cryptography() -> ModuleType:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as reason:
        raise UserError(
            "signing-missing",
            f"signatures need cryptography: pip install 'detr-distillery[sign]' ({reason})",
        ) from reason
    return serialization
