"""What a file with weights says about itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import onnx

from detr.files import sha256
from engines.bundle import is_bundle, open_bundle
from engines.evidence import EVIDENCE, Evidence, graph_evidence, read_evidence
from engines.oriented import open_bundles
from engines.verdict import FROM_GOOD_TO_BAD, Status

_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
}


def stored_parameters(artifact: Path) -> int | None:
    """Number of stored weights: what the file carries, folded constants and statistics included.

    Args:
        artifact: An ONNX graph or a ``.safetensors`` file; ``None`` is returned for anything else.
    """
    if artifact.suffix == ".onnx":
        graph = onnx.load(str(artifact), load_external_data=False).graph
        return sum(int(math.prod(t.dims)) for t in graph.initializer if t.data_type in _FLOATS)
    if artifact.suffix == ".safetensors":
        return _safetensors(artifact)
    return None


def _safetensors(path: Path) -> int | None:
    """The header is JSON, its length the eight little-endian bytes before it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # A header is never larger than its file; anything else is not the format.
        if length > path.stat().st_size:
            return None
        header = json.loads(file.read(length))
    return sum(int(math.prod(v["shape"])) for k, v in header.items() if k != "__metadata__")


def identity(artifacts: Sequence[Path]) -> str:
    """The file's SHA-256; of several files that of their hashes in turn."""
    hashes = [sha256(file) for file in artifacts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def worst_status(artifacts: Sequence[Path], engine: str) -> Status | None:
    """The worst of :func:`parity_status` of several files, ``None`` where one has none."""
    found = [parity_status(file, engine) for file in artifacts]
    statuses = [status for status in found if status is not None]
    if len(statuses) < len(found):
        return None
    return max(statuses, key=FROM_GOOD_TO_BAD.index)


def parity_status(artifact: Path, engine: str) -> Status | None:
    """The parity gate's verdict on this very file in an engine, ``None`` where there is none."""
    if not (artifact.parent / EVIDENCE).exists():
        return None
    evidence: Evidence | None
    if is_bundle(artifact.parent):
        evidence = graph_evidence(open_bundle(artifact.parent))
    else:
        evidence = read_evidence(artifact.parent)
        if evidence.sha256 != sha256(artifact):
            evidence = None
    if evidence is None or evidence.artifact != artifact.name:
        return None
    verdict = evidence.verdicts.get(engine)
    return None if verdict is None else verdict.status


def provenance(model: Path, artifact: Path) -> tuple[str, str]:
    """What a model says of itself: its precision, and the hash of the weights it was made from.

    A bundle's own words; a checkpoint is fp32 and its own origin.
    """
    if not is_bundle(model):
        return "fp32", sha256(artifact)
    info = open_bundles(model)[0].info
    return info.precision, info.source.sha256
