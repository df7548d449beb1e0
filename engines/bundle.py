"""The bundle: a portable folder with the model, what it means, and proof of what it must answer.

``NAME.bundle/`` holds ``model.onnx``, ``golden.npz`` (a few images with the detections of the torch
model) and ``bundle.json``, which names every file with its hash. Nothing in a bundle is trusted
before its hash is checked, and nothing outside the folder is ever read.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from detr.config import Strict
from detr.errors import UserError
from detr.files import sha256
from detr.mask_scaling import MaskScaling
from detr.masks import Rle
from detr.model_info import BundledInfo
from detr.sidecar import SidecarError, read_sidecar
from detr.types import Detections, ImageArray
from engines.msda_function import Lowering
from engines.parity import Parity
from engines.precision_report import PrecisionReport
from engines.signature import check_trusted

SIDECAR = "bundle.json"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
INPUTS = ("images", "valid_sizes", "original_sizes")
OUTPUTS = ("boxes", "scores", "labels")
# The further output of a detector with masks: logits [B, T, h, w] of its detections, float32.
MASKS = "masks"
# Bundles within a folder that has one for each orientation, see :mod:`engines.oriented`.
ORIENTATIONS = ("landscape.bundle", "portrait.bundle")

_WITH = {False: "without masks", True: "with masks"}

Precision = Literal["fp32", "fp16", "int8"]


class Source(Strict):
    """The checkpoint a bundle was made from.

    Attributes:
        path: Absolute path of the weights at the time.
        sha256: Their hash.
    """

    path: str
    sha256: str


class BundleInfo(Strict):
    """The sidecar ``bundle.json``.

    Attributes:
        format: Version of this file; 1 differs in the format of ``model`` alone.
        model: Architecture, classes and preprocessing.
        opset: ONNX operator set of the graph.
        precision: ``fp32``, ``fp16`` or ``int8``, as typed in the graph.
        island: The parts that compute in float32 all the same, as ``kind`` or ``kind:module``;
            empty in an ``fp32`` graph.
        precision_report: The search for the island and the comparison with other precisions, where
            they were asked for.
        lowering: Body of the deformable-attention function.
        batch: Batch size of the graph, or ``dynamic``.
        inputs, outputs: Names of the graph's inputs and outputs.
        masks: How its fourth output, ``masks``, becomes masks of the image; not in the file of a
            detector of boxes alone.
        files: SHA-256 of every file but this one, by path inside the folder.
        source: Where the weights came from.
        reference_ap: COCO AP of the torch model on its validation set, where it is known.
        parity: How far ONNX Runtime was from torch when the bundle was made.
        versions: Package versions it was made with.
    """

    format: Literal[2] = 2
    model: BundledInfo
    opset: int
    precision: Precision = "fp32"
    island: tuple[str, ...] = ()
    precision_report: PrecisionReport = PrecisionReport()
    lowering: Lowering
    batch: int | Literal["dynamic"]
    inputs: tuple[str, ...] = INPUTS
    outputs: tuple[str, ...] = OUTPUTS
    masks: MaskScaling | None = None
    files: dict[str, str]
    source: Source
    reference_ap: float | None = None
    parity: Parity | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_this_format(cls, content: Any) -> Any:
        first = isinstance(content, dict) and content.get("format") == 1
        return {**content, "format": 2} if first else content

    @model_validator(mode="after")
    def _masks_are_an_output(self) -> BundleInfo:
        wanted = OUTPUTS if self.masks is None else (*OUTPUTS, MASKS)
        if self.outputs != wanted:
            raise ValueError(f"outputs are {', '.join(wanted)} {_WITH[self.masks is not None]}")
        return self

    @model_serializer(mode="wrap")
    def _as_ever_without_masks(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A bundle of boxes alone has the file it had before there were masks."""
        content: dict[str, Any] = plain(self)
        if self.masks is None:
            del content["masks"]
        return content

    @property
    def fingerprint(self) -> str:
        """Hash of everything its detections follow from: graph, weights, classes, preprocessing.

        A verdict on a bundle holds while this stays what it was; the graph's hash alone would not
        notice another order of the classes or another mean.
        """
        meaning: dict[str, Any] = {
            "files": {name: digest for name, digest in self.files.items() if name != GOLDEN},
            "classes": self.model.classes.model_dump(mode="json"),
            # Without what is not set: keys that came later change no older bundle's hash.
            "preprocess": self.model.preprocess.model_dump(mode="json", exclude_none=True),
        }
        if self.masks is not None:
            meaning["masks"] = self.masks.model_dump(mode="json")
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Golden:
    """Images and what the torch model found in them.

    Attributes:
        images: ``[h, w, 3]`` uint8 RGB each.
        detections: The torch model's, one per image.
    """

    images: list[ImageArray]
    detections: list[Detections]

    def to_bytes(self) -> bytes:
        """The content of a ``golden.npz``."""
        arrays: dict[str, Any] = {f"image_{i}": image for i, image in enumerate(self.images)}
        for i, found in enumerate(self.detections):
            arrays |= {
                f"boxes_{i}": found.boxes,
                f"scores_{i}": found.scores,
                f"labels_{i}": found.labels,
            }
            if found.masks is not None:
                arrays[f"masks_{i}"] = np.array([mask.counts for mask in found.masks], np.bytes_)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked.

    Attributes:
        path: The folder.
        info: Its sidecar.
    """

    path: Path
    info: BundleInfo

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    def golden(self) -> Golden:
        """The images and detections the model was exported with."""
        with np.load(self.path / GOLDEN, allow_pickle=False) as arrays:
            count = sum(name.startswith("image_") for name in arrays.files)
            return Golden(
                [arrays[f"image_{i}"] for i in range(count)],
                [
                    replace(
                        Detections(*(arrays[f"{name}_{i}"] for name in OUTPUTS)),
                        masks=_golden_masks(arrays, i),
                    )
                    for i in range(count)
                ],
            )


def outputs_of(model: onnx.ModelProto) -> tuple[tuple[str, ...], MaskScaling | None]:
    """The outputs of a graph that goes into a bundle, and how its masks become pixels."""
    names = tuple(value.name for value in model.graph.output)
    return names, MaskScaling() if MASKS in names else None


def _golden_masks(arrays: Any, i: int) -> tuple[Rle, ...] | None:
    """Run lengths of masks of an image's size, which are text to :mod:`detr.masks`."""
    if f"{MASKS}_{i}" not in arrays.files:
        return None
    height, width = arrays[f"image_{i}"].shape[:2]
    return tuple(Rle((height, width), counts.decode()) for counts in arrays[f"{MASKS}_{i}"])


def is_bundle(path: Path) -> bool:
    """Whether a path is meant as a bundle: a folder named so, or one with a sidecar or a graph."""
    return path.is_dir() and (
        path.suffix == ".bundle"
        or (path / SIDECAR).exists()
        or (path / MODEL).exists()
        or is_oriented(path)
    )


def is_oriented(path: Path) -> bool:
    """Whether a folder holds one bundle for each orientation of an image."""
    return all((path / name).is_dir() for name in ORIENTATIONS)


def open_bundle(path: Path, trusted: bool = True) -> Bundle:
    """Reads a bundle and checks every file in it.

    Args:
        path: Its folder.
        trusted: Whether to ask for a signature where the environment does; a bundle about to be
            signed has none.

    Raises:
        UserError: ``bundle-missing`` (no such folder), ``bundle-sidecar`` (no or bad
            ``bundle.json``), ``bundle-missing-file``, ``bundle-changed`` (hash differs),
            ``bundle-outside`` (a file outside the folder is named), ``bundle-external-data`` (the
            graph takes weights from a file the sidecar does not name), ``bundle-orientation`` (two
            bundles, where one is wanted). Where a signature is asked for, what
            :func:`engines.signature.check` raises.
    """
    if not path.is_dir():
        raise UserError("bundle-missing", f"{path}: no such bundle folder")
    if is_oriented(path):
        raise UserError(
            "bundle-orientation",
            f"{path}: holds a bundle for landscape and one for portrait images; name one of "
            f"{', '.join(str(path / name) for name in ORIENTATIONS)}",
        )
    if trusted:
        check_trusted(path)
    try:
        info = read_sidecar(path / SIDECAR, BundleInfo)
    except SidecarError as error:
        raise UserError("bundle-sidecar", str(error)) from error
    for name in (MODEL, GOLDEN):
        if name not in info.files:
            raise UserError("bundle-sidecar", f"{path / SIDECAR}: files: {name} is not listed")
    for name, expected in info.files.items():
        _check_file(path, name, expected)
    _check_external_data(path, info)
    return Bundle(path, info)


def _check_file(folder: Path, name: str, expected: str) -> None:
    if not _is_inside(name):
        raise UserError(
            "bundle-outside", f"{folder / SIDECAR}: files: {name} is outside the bundle"
        )
    file = folder / name
    if not file.is_file():
        raise UserError("bundle-missing-file", f"{file}: named in {SIDECAR} but not there")
    if sha256(file) != expected:
        raise UserError(
            "bundle-changed",
            f"{file}: not the file that was exported (its hash differs); export again",
        )


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts and "\\" not in name


def _check_external_data(folder: Path, info: BundleInfo) -> None:
    """Weights may lie beside the graph only in a file whose hash was checked."""
    try:
        graph = onnx.load(str(folder / MODEL), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError is private to its implementation
        raise UserError("bundle-model", f"{folder / MODEL}: not an ONNX model") from error
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            location = ExternalDataInfo(tensor).location
            if location not in info.files:
                raise UserError(
                    "bundle-external-data",
                    f"{folder / MODEL}: weight {tensor.name} lies in {location}, which is not part "
                    "of the bundle",
                )
