"""What is known of an artifact: which file, made how, and whether it was shown to answer rightly.

``evidence.json`` lies beside every engine, and in a bundle for its graph. An engine contains code,
so one whose hash is not the one written here is never loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from detr.config import Record
from detr.errors import UserError
from detr.files import write_atomic
from detr.sidecar import SidecarError, read_sidecar
from engines.bundle import MODEL, Bundle, Precision
from engines.trt.backend import BuildLowering
from engines.verdict import EngineVerdict

EVIDENCE = "evidence.json"
EVIDENCE_FORMAT: Literal[2] = 2
# The first release wrote the second name.
_ARTIFACT = AliasChoices("artifact", "artefact")
LayerSource = Literal["engine", "builder", "network"]


class LayerCount(Record):
    """The layer report in short.

    Attributes:
        source: See :class:`engines.trt.layers.LayerReport`.
        count: Number of layers, constants left out.
    """

    source: LayerSource
    count: int


class PtxVersions(Record):
    """Versions of PTX of the plugin's kernels.

    Attributes:
        compiled: What the compiler wrote.
        embedded: What the engine holds, which older drivers take, too.
    """

    compiled: str
    embedded: str


class EngineBuild(Record):
    """How an engine was built.

    Attributes:
        version: Of the runtime that built it.
        platform: Operating system and processor it was built on; ``None`` where nobody wrote it
            down, which fits no platform.
        compute_capabilities: GPUs it is for, 86 for 8.6.
        precision: Types of the graph.
        lowering: How it computes deformable attention.
        plugin_sha256: Hash of our plugin's code, where it is in the engine.
        ptx: Of the plugin, where it is in the engine.
        version_compatible: Whether it runs in later releases of the same major version.
        hardware_compatible: Whether it runs on any GPU from Ampere on.
        dla_layers: How many of the network's layers were given to the DLA.
        batch: Smallest, usual and largest batch.
        seconds: Time the build took.
        bytes: Size of the engine.
        memory_bytes: Memory by kind: ``activation``, ``weights`` as the builder says, ``device`` as
            the opened engine does.
        layers: Number of layers.
        not_run_because: Why it could not run on the machine that built it; ``None`` where it could.
    """

    version: str
    platform: str | None = None
    compute_capabilities: tuple[int, ...]
    precision: Precision
    lowering: BuildLowering
    plugin_sha256: str | None
    ptx: PtxVersions | None = None
    version_compatible: bool
    hardware_compatible: bool
    dla_layers: int = 0
    batch: tuple[int, int, int]
    seconds: float
    bytes: int
    memory_bytes: dict[str, int]
    layers: LayerCount
    not_run_because: str | None


def _stored_build(value: Any) -> Any:
    """Format 1 has an empty mapping where nothing was built."""
    return None if value == {} else value


class Evidence(Record):
    """The file ``evidence.json``.

    Attributes:
        format: Version of this file.
        artifact: Name of the file it speaks of, in the same folder.
        sha256: Hash of that file.
        bundle_sha256: :attr:`engines.bundle.BundleInfo.fingerprint` of the bundle it was made from.
        backend: Runtime the artifact is for, as ``open_engine`` takes it.
        status: ``unverified`` until the parity gate has seen it.
        reasons: What was over the budget, one phrase each; empty unless rejected.
        verdicts: The gate's verdicts by engine.
        build: How it was built; ``None`` for a bundle's graph.
    """

    format: Literal[1, 2] = EVIDENCE_FORMAT
    artifact: str = Field(validation_alias=_ARTIFACT)
    sha256: str
    bundle_sha256: str
    backend: str
    status: Literal["unverified", "accepted", "rejected"] = "unverified"
    reasons: tuple[str, ...] = ()
    verdicts: dict[str, EngineVerdict] = {}
    build: Annotated[EngineBuild | None, BeforeValidator(_stored_build)] = None

    def write(self, folder: Path) -> None:
        """Writes it into the artifact's folder, all or nothing."""
        write_atomic(folder / EVIDENCE, self.model_dump_json(indent=2) + "\n")


@dataclass(frozen=True)
class Trusted:
    """An artifact whose hash is the one in its evidence.

    Attributes:
        path: Where it lies.
        data: The very bytes that were hashed; the file may have changed since.
        evidence: What is known of it.
    """

    path: Path
    data: bytes
    evidence: Evidence


def read_evidence(folder: Path) -> Evidence:
    """Reads the evidence of the artifact in a folder; the artifact itself is not looked at.

    Raises:
        UserError: ``evidence-missing`` or ``evidence-unreadable``.
    """
    path = folder / EVIDENCE
    if not path.exists():
        raise UserError("evidence-missing", f"{path}: no such file")
    try:
        return read_sidecar(path, Evidence)
    except SidecarError as error:
        raise UserError("evidence-unreadable", str(error)) from error


def graph_evidence(bundle: Bundle) -> Evidence | None:
    """What is known of a bundle's graph; ``None`` where nothing is known of this very bundle.

    Raises:
        UserError: ``evidence-unreadable``.
    """
    if not (bundle.path / EVIDENCE).exists():
        return None
    evidence = read_evidence(bundle.path)
    same = (evidence.sha256, evidence.bundle_sha256) == (
        bundle.info.files[MODEL],
        bundle.info.fingerprint,
    )
    return evidence if same else None


def graph_verdict(bundle: Bundle, engine: str) -> EngineVerdict | None:
    """The gate's verdict on a bundle's graph in an engine, where there is one.

    Raises:
        UserError: ``evidence-unreadable``.
    """
    evidence = graph_evidence(bundle)
    return None if evidence is None else evidence.verdicts.get(engine)


def trusted_artifact(folder: Path) -> Trusted:
    """The artifact of a folder and its evidence, its hash checked.

    Raises:
        UserError: ``artifact-changed`` where the hash differs, ``artifact-missing``, and what
            :func:`read_evidence` raises.
    """
    evidence = read_evidence(folder)
    path = folder / Path(evidence.artifact).name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            "artifact-missing", f"{path}: named in {EVIDENCE} but not there ({error.strerror})"
        ) from error
    if hashlib.sha256(data).hexdigest() != evidence.sha256:
        raise UserError(
            "artifact-changed",
            f"{path}: its hash is not the one in {EVIDENCE}; it is not loaded, build it again",
        )
    return Trusted(path, data, evidence)
