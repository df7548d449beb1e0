"""A Triton Inference Server model repository from a bundle.

Field names are those of Triton's ``model_config.proto``. Pre-processing stays with the client, who
finds everything it needs in the ``bundle.json`` beside the model.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from detr.data.preprocess import preprocess
from detr.errors import UserError
from detr.files import output_error, write_atomic
from engines.bundle import GOLDEN, INPUTS, MODEL, SIDECAR, Bundle
from engines.evidence import EVIDENCE, read_evidence, trusted_artifact
from export.deploy.graph_alone import check_graph_alone

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
# TensorRT-RTX engines are not for Triton's TensorRT backend.
_BACKEND = "tensorrt"

_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output as the configuration names it.

    Attributes:
        name: Of the graph's tensor.
        type: Triton's name of its type.
        dims: Its shape, without the batch where Triton does the batching.
    """

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        folder: The model's folder in the repository.
        version: Number of the new version.
        backend: ``onnxruntime`` or ``tensorrt``.
        max_batch: Largest batch Triton puts together, 0 where the batch is static.
    """

    folder: Path
    version: int
    backend: str
    max_batch: int


def write_repository(
    bundle: Bundle, out: Path, engine: str | None = None, max_batch: int = 8, name: str = ""
) -> Repository:
    """Adds a bundle to a model repository as a new version of its model.

    Args:
        bundle: What to serve.
        out: The repository.
        engine: Folder below the bundle's ``engines``; by default the one TensorRT engine there, and
            the ONNX file where there is none.
        max_batch: Largest batch of a dynamic ONNX file; an engine's is that of its profile.
        name: Of the model; the bundle's by default.

    Raises:
        UserError: ``triton-engine`` (which engine, or one Triton does not take),
            ``engine-rejected``, ``triton-name``, ``triton-differs`` (the repository has a model of
            this name with other inputs and outputs), ``deploy-nms``, and what trusting the engine
            raises.
    """
    check_graph_alone(bundle, "Triton")
    name = name or bundle.path.resolve().stem
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UserError(
            "triton-name", f"{name!r}: a Triton model is named with letters, digits, . _ and -"
        )
    chosen = _engine(bundle, engine)
    backend, content, evidence = "onnxruntime", bundle.model.read_bytes(), None
    if chosen is not None:
        trusted = trusted_artifact(chosen)
        content, evidence = trusted.data, trusted.evidence
        backend = _BACKEND
    dynamic = bundle.info.batch == "dynamic"
    largest = max_batch if evidence is None or evidence.build is None else evidence.build.batch[-1]
    batch = largest if dynamic else 0
    folder = out / name
    config = _config(bundle, name, backend, batch)
    if (folder / CONFIG).exists() and (folder / CONFIG).read_text() != config:
        raise UserError(
            "triton-differs",
            f"{folder / CONFIG}: a model of other inputs, outputs or batch has this name; remove "
            "it, or take another --name",
        )
    version = _next_version(folder)
    place = folder / str(version)
    try:
        place.mkdir(parents=True, exist_ok=True)
        # The model last: Triton takes a version with a model in it as complete.
        shutil.copyfile(bundle.path / SIDECAR, place / SIDECAR)
        if chosen is None:
            for weights in bundle.info.files.keys() - {MODEL, GOLDEN}:
                shutil.copyfile(bundle.path / weights, place / weights)
        if chosen is not None:
            shutil.copyfile(chosen / EVIDENCE, place / EVIDENCE)
        _write_warm_up(bundle, folder / "warmup", batch)
        write_atomic(folder / LABELS, "\n".join(bundle.info.model.classes.names) + "\n")
        write_atomic(folder / CONFIG, config)
        write_atomic(place / _file(backend), content)
    except OSError as error:
        raise output_error(folder, error) from error
    return Repository(folder, version, backend, batch)


def _file(backend: str) -> str:
    return "model.plan" if backend == _BACKEND else MODEL


def _engine(bundle: Bundle, engine: str | None) -> Path | None:
    """The engine to serve; ``None`` for the ONNX file."""
    root = bundle.path / "engines"
    if engine is not None:
        folder = root / engine
        evidence = read_evidence(folder)
        if evidence.backend != _BACKEND:
            raise UserError(
                "triton-engine", f"{folder}: Triton runs tensorrt engines, not {evidence.backend}"
            )
        if evidence.status == "rejected":
            raise UserError(
                "engine-rejected",
                f"{folder}: the parity gate rejected this engine: {'; '.join(evidence.reasons)}",
            )
        if evidence.bundle_sha256 != bundle.info.fingerprint:
            raise UserError(
                "triton-engine",
                f"{folder}: built from another graph, or for other classes or preprocessing, than "
                "the bundle's; build it again",
            )
        return folder
    built = {
        folder: read_evidence(folder)
        for folder in sorted(root.glob(f"{_BACKEND}-*"))
        if (folder / EVIDENCE).is_file()
    }
    usable = [
        folder
        for folder, evidence in built.items()
        if evidence.backend == _BACKEND
        and evidence.status != "rejected"
        and evidence.bundle_sha256 == bundle.info.fingerprint
    ]
    if len(usable) > 1:
        raise UserError(
            "triton-engine",
            f"{root}: several engines; choose one with --engine: "
            + ", ".join(folder.name for folder in usable),
        )
    return usable[0] if usable else None


def _next_version(folder: Path) -> int:
    taken = [int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdecimal()]
    return max(taken, default=0) + 1


def _tensors(bundle: Bundle, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the graph; a static batch is part of the shape."""
    graph = onnx.load(str(bundle.model), load_external_data=False).graph
    result: list[list[Tensor]] = []
    for values in (graph.input, graph.output):
        group = []
        for value in values:
            kind = value.type.tensor_type
            # A dimension with a name and no number is the batch, or one only the run knows.
            dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            group.append(Tensor(value.name, _TYPES[kind.elem_type], dims[1:] if batch else dims))
        result.append(group)
    return result[0], result[1]


def _config(bundle: Bundle, name: str, backend: str, batch: int) -> str:
    """The text of ``config.pbtxt``."""
    inputs, outputs = _tensors(bundle, batch)
    kind = "KIND_GPU" if backend == _BACKEND else "KIND_AUTO"
    parts = [
        f'name: "{name}"',
        f'backend: "{backend}"',
        f"max_batch_size: {batch}",
        f'default_model_filename: "{_file(backend)}"',
        *(f"input [ {_tensor(tensor)} ]" for tensor in inputs),
        *(f"output [ {_tensor(tensor)} ]" for tensor in outputs),
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
        # Waits for nobody: a request alone in the queue runs at once.
        *(["dynamic_batching { }"] if batch else []),
        _warm_up(inputs),
    ]
    return "\n".join(parts) + "\n"


def _tensor(tensor: Tensor) -> str:
    dims = ", ".join(map(str, tensor.dims))
    return f'{{ name: "{tensor.name}" data_type: {tensor.type} dims: [ {dims} ] }}'


def _warm_up(inputs: list[Tensor]) -> str:
    """The bundle's first golden image, twice: the first call allocates, the second is measured."""
    lines = ['model_warmup [ {\n  name: "golden"\n  batch_size: 1\n  count: 2']
    for tensor in inputs:
        dims = ", ".join(map(str, tensor.dims))
        lines.append(
            f'  inputs {{ key: "{tensor.name}" value {{ data_type: {tensor.type} '
            f'dims: [ {dims} ] input_data_file: "{tensor.name}" }} }}'
        )
    return "\n".join([*lines, "} ]"])


def _write_warm_up(bundle: Bundle, folder: Path, batch: int) -> None:
    """Raw tensors, row by row, as Triton reads them."""
    first = bundle.golden().images[:1]
    prepared = preprocess(first, bundle.info.model.preprocess)
    repeat = 1 if batch else bundle.info.batch
    assert isinstance(repeat, int)
    arrays = (prepared.images, prepared.valid_sizes, prepared.original_sizes)
    for name, array in zip(INPUTS, arrays, strict=True):
        write_atomic(folder / name, np.repeat(array, repeat, axis=0).tobytes())
