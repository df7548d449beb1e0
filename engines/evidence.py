"""What is known of an artefact: which file, made how, and whether it was shown to answer rightly.

``evidence.json`` lies beside every engine, and in a bundle for its graph. An engine contains code,
so one whose hash is not the one written here is never loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from detr.config import Strict
from detr.errors import UserError, first_problem
from detr.files import sha256, write_atomic

EVIDENCE = "evidence.json"


class Evidence(Strict):
    """The file ``evidence.json``.

    Attributes:
        format: Version of this file.
        artefact: Name of the file it speaks of, in the same folder.
        sha256: Hash of that file.
        bundle_sha256: Hash of the bundle's graph the artefact was made from.
        backend: Runtime the artefact is for, as ``open_engine`` takes it.
        status: ``unverified`` until the parity gate has seen it.
        reasons: What was over the budget, one phrase each; empty unless rejected.
        verdicts: The gate's findings by engine.
        build: How it was made: versions, compute capability, precision, lowering, plugin hash,
            flags, seconds.
    """

    format: Literal[1] = 1
    artefact: str
    sha256: str
    bundle_sha256: str
    backend: str
    status: Literal["unverified", "accepted", "rejected"] = "unverified"
    reasons: tuple[str, ...] = ()
    verdicts: dict[str, dict[str, Any]] = {}
    build: dict[str, Any] = {}

    def write(self, folder: Path) -> None:
        """Writes it into the artefact's folder, all or nothing."""
        write_atomic(folder / EVIDENCE, self.model_dump_json(indent=2) + "\n")


def read_evidence(folder: Path) -> Evidence:
    """Reads the evidence of the artefact in a folder; the artefact itself is not looked at.

    Raises:
        UserError: ``evidence-missing`` or ``evidence-unreadable``.
    """
    path = folder / EVIDENCE
    try:
        return Evidence.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError("evidence-missing", f"{path}: no such file") from error
    except OSError as error:
        raise UserError("evidence-unreadable", f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise UserError("evidence-unreadable", f"{path}: {first_problem(error)}") from error


def trusted_artefact(folder: Path) -> tuple[Path, Evidence]:
    """The artefact of a folder and its evidence, its hash checked.

    Raises:
        UserError: ``artefact-changed`` where the hash differs, ``artefact-missing``, and what
            :func:`read_evidence` raises.
    """
    evidence = read_evidence(folder)
    path = folder / Path(evidence.artefact).name
    if not path.is_file():
        raise UserError("artefact-missing", f"{path}: named in {EVIDENCE} but not there")
    if sha256(path) != evidence.sha256:
        raise UserError(
            "artefact-changed",
            f"{path}: its hash is not the one in {EVIDENCE}; it is not loaded, build it again",
        )
    return path, evidence
