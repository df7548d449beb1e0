"""A small C++ program that runs a bundle, from the templates in ``cpp_sample``."""

from __future__ import annotations

from pathlib import Path

import onnx
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from detr.errors import UserError
from detr.files import write_atomic
from engines.bundle import MASKS, MODEL, Bundle
from export.deploy.graph_alone import check_graph_alone

_TEMPLATES = Path(__file__).with_name("cpp_sample")
_PLAIN = ("image.hpp", "preprocess.hpp", "masks.hpp", "detector.hpp", "main.cpp", "dump_input.cpp")


def write_sample(bundle: Bundle, out: Path, runtime: str) -> list[Path]:
    """Writes the program's sources.

    Args:
        bundle: What it shall run; its sizes, classes and normalization become constants.
        out: Folder of the sources.
        runtime: ``onnxruntime`` or ``tensorrt``.

    Returns:
        The files written.

    Raises:
        UserError: ``deploy-nms``, ``cpp-range`` for a model of deeper pictures than the program
            reads; the folder is not writable or the disk is full.
    """
    check_graph_alone(bundle, "the program")
    info = bundle.info.model
    if info.preprocess.range is not None:
        raise UserError(
            "cpp-range",
            f"{bundle.path}: its model is for pictures of more than 8 bits (range "
            f"{list(info.preprocess.range)}), which the program does not read",
        )
    (height, width), *_ = info.preprocess.canvases
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["cstring"] = c_string
    values = {
        "runtime": runtime,
        "name": bundle.path.name,
        "height": height,
        "width": width,
        "short": info.preprocess.short or 0,
        "long": info.preprocess.long or 0,
        "masks": bundle.info.masks,
        "mask_cells": _mask_cells(bundle),
        "batch": 1 if bundle.info.batch == "dynamic" else bundle.info.batch,
        "mean": ", ".join(map(_float, info.preprocess.mean)),
        "std": ", ".join(map(_float, info.preprocess.std)),
        "classes": info.classes.names,
        "sha256": bundle.info.files[MODEL],
    }
    contents = {name: (_TEMPLATES / name).read_text() for name in _PLAIN}
    source = f"detector_{runtime}.cpp"
    contents[source] = (_TEMPLATES / source).read_text()
    for name in ("model_info.hpp", "CMakeLists.txt"):
        contents[name] = templates.get_template(f"{name}.j2").render(values)
    for name, text in contents.items():
        write_atomic(out / name, text)
    return [out / name for name in contents]


def _mask_cells(bundle: Bundle) -> tuple[int, int]:
    """Height and width of the map of a mask; 1 x 1 in place of none."""
    if bundle.info.masks is None:
        return 1, 1
    graph = onnx.load(str(bundle.model), load_external_data=False).graph
    (output,) = (value for value in graph.output if value.name == MASKS)
    height, width = (dim.dim_value for dim in output.type.tensor_type.shape.dim[2:])
    return height, width


def c_string(text: str) -> str:
    """A C++ string literal; bytes outside ASCII and quotes are written as octal escapes.

    Octal, because a hexadecimal escape would swallow the digits after it.
    """
    safe = (chr(b) if 32 <= b < 127 and b not in b'"\\?' else f"\\{b:03o}" for b in text.encode())
    return '"' + "".join(safe) + '"'


def _float(value: float) -> str:
    """A float literal that reads back as the same double."""
    return f"{float(value)!r}f"
