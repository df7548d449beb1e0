"""The gate's verdicts in the evidence files beside the artefacts, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detr.errors import GateError
from engines.base import Engine
from engines.bundle import MODEL, Bundle
from engines.evidence import Evidence, graph_evidence, trusted_artefact
from engines.ort_engine import OrtEngine
from export.parity.verdict import STATUSES, GateVerdict


def record(bundle: Bundle, engines: Iterable[Engine], verdict: GateVerdict) -> None:
    """Writes verdicts into the evidence file beside each artefact.

    Verdicts of other engines on the same file are kept; one rejection makes the file rejected.

    Args:
        bundle: What was judged.
        engines: Those that were opened; one that was not ran the bundle's graph.
        verdict: What the gate found.

    Raises:
        UserError: ``artefact-changed`` where an engine's file is not the one that was judged.
    """
    folders = {engine.name: engine.artefact.parent for engine in engines}
    by_folder: dict[Path, set[str]] = {}
    for entry in verdict.engines:
        by_folder.setdefault(folders.get(entry.engine, bundle.path), set()).add(entry.engine)
    for folder, names in by_folder.items():
        if folder == bundle.path:
            evidence = graph_evidence(bundle) or unverified(bundle)
        else:
            evidence = trusted_artefact(folder).evidence
        found: dict[str, dict[str, Any]] = dict(evidence.verdicts)
        for name in names:
            entries = [e for e in verdict.engines if e.engine == name]
            worst = max(entries, key=lambda entry: STATUSES.index(entry.status))
            found[name] = worst.model_dump(mode="json") | {"budget": verdict.budget.model_dump()}
        rejected = [(k, v) for k, v in found.items() if v["status"] == "rejected"]
        undecided = any(v["status"] == "undecided" for v in found.values())
        evidence.model_copy(
            update={
                "verdicts": found,
                "status": "rejected" if rejected else "unverified" if undecided else "accepted",
                "reasons": tuple(f"{k}: {reason}" for k, v in rejected for reason in v["reasons"]),
            }
        ).write(folder)


def unverified(bundle: Bundle) -> Evidence:
    """Evidence of a graph nobody has compared with anything."""
    return Evidence(
        artefact=bundle.model.name,
        sha256=bundle.info.files[MODEL],
        bundle_sha256=bundle.info.fingerprint,
        backend=OrtEngine.name,
    )


def refuse_rejected(bundle: Bundle) -> None:
    """Lets nothing be made of a graph that is known to answer wrongly.

    Raises:
        GateError: ``bundle-rejected``.
    """
    evidence = graph_evidence(bundle)
    # Another engine's rejection says nothing about the graph.
    verdict = {} if evidence is None else evidence.verdicts.get(OrtEngine.name, {})
    if verdict.get("status") == "rejected":
        raise GateError(
            "bundle-rejected",
            f"{bundle.path}: the parity gate rejected its graph ({'; '.join(verdict['reasons'])}); "
            f"export it again, or judge it again with: detr export verify {bundle.path}",
        )
