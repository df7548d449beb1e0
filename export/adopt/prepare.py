"""Someone's ONNX file as a static graph of one image, all constants folded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto

from detr.errors import UserError
from engines.msda_function import OPSETS
from engines.ort_engine import open_session, session_options

# What ONNX Runtime's first level of optimization adds to the list, used or not.
_STANDARD = ("", "ai.onnx")


def load(path: Path) -> ModelProto:
    """Reads a file.

    Raises:
        UserError: ``adopt-unreadable``.
    """
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except OSError as error:
        raise UserError("adopt-unreadable", f"{path}: {error.strerror or error}") from error
    except onnx.checker.ValidationError as error:
        raise UserError("adopt-unreadable", f"{path}: {_first_line(error)}") from error
    except Exception as error:  # protobuf's own
        told = f"{path}: not an ONNX model: {_first_line(error)}"
        raise UserError("adopt-unreadable", told) from error
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def static(model: ModelProto, shapes: Mapping[str, tuple[int, ...]], place: Path) -> ModelProto:
    """The graph for inputs of fixed shapes, what follows from them computed.

    Args:
        model: As read; left as it is.
        shapes: Of every input.
        place: The file, for messages.

    Raises:
        UserError: ``adopt-input`` where the graph was exported for another shape,
            ``adopt-unrunnable`` where ONNX Runtime cannot run it.
    """
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name not in shapes:
            continue
        sizes = value.type.tensor_type.shape.dim
        wanted = shapes[value.name]
        given = [size.dim_value for size in sizes]
        if len(given) != len(wanted) or any(
            g and g != w for g, w in zip(given, wanted, strict=True)
        ):
            raise UserError(
                "adopt-input",
                f"{place}: input {value.name} was exported as {given}, which is not {list(wanted)}",
            )
        for size, number in zip(sizes, wanted, strict=True):
            size.dim_value = number
    # Sizes that were computed with other inputs.
    del fixed.graph.value_info[:]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save_model(fixed, str(source))
        options = session_options(None)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        try:
            open_session(source, options)
        except Exception as error:  # the runtime's exceptions share no base
            first = str(error).splitlines()[0]
            raise UserError("adopt-unrunnable", f"{place}: ONNX Runtime: {first}") from error
        prepared = onnx.load(str(target))
    used = {node.domain for node in prepared.graph.node}
    kept = [entry for entry in prepared.opset_import if entry.domain in {*used, ""}]
    del prepared.opset_import[:]
    prepared.opset_import.extend(kept)
    return prepared


def to_known_opset(model: ModelProto, place: Path) -> ModelProto:
    """The graph in an opset our function is written for.

    Raises:
        UserError: ``adopt-opset`` where there is no way there.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in _STANDARD)
    if opset in OPSETS:
        return model
    target = OPSETS[0] if opset < OPSETS[0] else OPSETS[-1]
    try:
        return onnx.version_converter.convert_version(model, target)
    except Exception as error:  # the converter's exceptions share no base
        raise UserError(
            "adopt-opset",
            f"{place}: of opset {opset}, which cannot be brought to {target}: export it again with "
            f"opset {' or '.join(map(str, OPSETS))}",
        ) from error


def constants_apart(model: ModelProto) -> ModelProto:
    """Makes constants among the nodes initializers, as those of our own graphs are.

    Args:
        model: Changed.
    """
    graph = model.graph
    constant = [n.op_type == "Constant" and n.attribute[0].name == "value" for n in graph.node]
    for node, moves in zip(graph.node, constant, strict=True):
        if moves:
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
    nodes = [node for node, moves in zip(graph.node, constant, strict=True) if not moves]
    kept = onnx.GraphProto()
    kept.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(kept.node)
    return model
