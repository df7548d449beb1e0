"""The gate's verdicts in the evidence files beside the artifacts, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from detr.errors import GateError
from engines.base import Engine
from engines.bundle import MODEL, Bundle
from engines.evidence import (
    EVIDENCE_FORMAT,
    Evidence,
    graph_evidence,
    graph_verdict,
    trusted_artifact,
)
from engines.ort_engine import OrtEngine
from engines.verdict import EngineVerdict
from export.parity.verdict import GateVerdict, worst_verdict


def write_evidence(bundle: Bundle, engines: Iterable[Engine], verdict: GateVerdict) -> None:
    """Writes verdicts into the evidence file beside each artifact.

    Verdicts of other engines on the same file are kept; one rejection makes the file rejected.

    Args:
        bundle: What went through the gate.
        engines: Those that were opened; one that was not ran the bundle's graph.
        verdict: What the gate says.

    Raises:
        UserError: ``artifact-changed`` where an engine's file is not the one that was compared.
    """
    folders = {engine.name: engine.artifact.parent for engine in engines}
    by_folder: dict[Path, dict[str, list[EngineVerdict]]] = {}
    for entry in verdict.engines:
        names = by_folder.setdefault(folders.get(entry.engine, bundle.path), {})
        names.setdefault(entry.engine, []).append(entry)
    for folder, names in by_folder.items():
        if folder == bundle.path:
            evidence = graph_evidence(bundle) or ungated_evidence(bundle)
        else:
            evidence = trusted_artifact(folder).evidence
        _with_verdicts(
            evidence, {name: worst_verdict(entries) for name, entries in names.items()}
        ).write(folder)


def _with_verdicts(evidence: Evidence, verdicts: Mapping[str, EngineVerdict]) -> Evidence:
    """Evidence with further verdicts, and the status that follows from all of them."""
    together = {**evidence.verdicts, **verdicts}
    rejected = {k: v for k, v in together.items() if v.status == "rejected"}
    undecided = any(v.status == "undecided" for v in together.values())
    return evidence.model_copy(
        update={
            "format": EVIDENCE_FORMAT,
            "verdicts": together,
            "status": "rejected" if rejected else "unverified" if undecided else "accepted",
            "reasons": tuple(f"{k}: {reason}" for k, v in rejected.items() for reason in v.reasons),
        }
    )


def ungated_evidence(bundle: Bundle) -> Evidence:
    """Evidence of a graph nobody has compared with anything."""
    return Evidence(
        artifact=bundle.model.name,
        sha256=bundle.info.files[MODEL],
        bundle_sha256=bundle.info.fingerprint,
        backend=OrtEngine.name,
    )


def refuse_rejected(bundle: Bundle) -> None:
    """Lets nothing be made of a graph that is known to answer wrongly.

    Raises:
        GateError: ``bundle-rejected``.
    """
    # Another engine's rejection says nothing about the graph.
    verdict = graph_verdict(bundle, OrtEngine.name)
    if verdict is not None and verdict.status == "rejected":
        raise GateError(
            "bundle-rejected",
            f"{bundle.path}: the parity gate rejected its graph ({'; '.join(verdict.reasons)}); "
            f"export it again, or compare it again with: detr export verify {bundle.path}",
        )
