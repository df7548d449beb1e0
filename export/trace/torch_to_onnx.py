"""A detector as an ONNX graph with one node per deformable attention."""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import onnx
import onnxscript
import torch
from onnx import ModelProto

from detr.models import Detector
from detr.models.fusing import fused
from engines.bundle import INPUTS, MASKS, OUTPUTS
from engines.msda_function import (
    DOMAIN,
    DOMAIN_VERSION,
    OP_TYPE,
    Lowering,
    head_shape,
    node_attributes,
    set_lowering,
)
from export.trace.opset17 import lower_to_17

# ONNX intermediate representation of opset 17 and 18's time; newer ones only shut out old runtimes.
_IR_VERSION = 9
# Where torch's exporter notes which modules a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Whatever a runtime would have to interpret, or could not fold; none of it belongs in a detector.
_FORBIDDEN = {"Loop", "If", "Scan", "SequenceConstruct", "SequenceAt", "ConcatFromSequence"}


def export_graph(
    detector: Detector,
    size: tuple[int, int],
    opset: int,
    batch: int | Literal["dynamic"],
    lowering: Lowering,
) -> ModelProto:
    """Traces ``detector.forward`` into ONNX, with its convolutions fused.

    Args:
        detector: In evaluation mode, on the CPU.
        size: Canvas (height, width).
        opset: 17 or 18.
        batch: Static size, or ``dynamic``.
        lowering: Body of the attention function.

    Returns:
        A checked model with inputs ``images``, ``valid_sizes``, ``original_sizes`` and outputs
        ``boxes``, ``scores``, ``labels``, and ``masks`` of a detector that has them: logits
        ``[B, T, H_4, W_4]`` of the detections' masks.

    Raises:
        ValueError: The graph holds control flow, or an operator its opset cannot express.
    """
    detector = fused(detector)
    dynamic = batch == "dynamic"
    # Two images for a dynamic batch: torch.export takes an example size of one for a constant.
    count = 2 if batch == "dynamic" else batch
    sizes = torch.tensor([[float(size[0]), float(size[1])]]).repeat(count, 1)
    example = (torch.zeros(count, 3, *size), sizes, sizes.clone())
    axis = {0: torch.export.Dim("batch", min=1, max=4096)}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            detector,
            example,
            dynamo=True,
            opset_version=18,
            input_names=list(INPUTS),
            output_names=[*OUTPUTS, *([MASKS] if detector.config.heads.masks else [])],
            dynamic_shapes=(axis, axis, axis) if dynamic else None,
            custom_translation_table={torch.ops.detr.ms_deform_attn.default: _translate},
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    model.ir_version = _IR_VERSION
    if opset == 17:
        lower_to_17(model)
    set_lowering(model, head_shape(detector.config), lowering)
    _name_nodes(model)
    _strip_notes(model)
    _check(model)
    return model


_SCHEMA = onnx.defs.OpSchema(
    OP_TYPE,
    DOMAIN,
    DOMAIN_VERSION,
    inputs=[onnx.defs.OpSchema.FormalParameter(x, "T") for x in ("value", "locations", "weights")],
    outputs=[onnx.defs.OpSchema.FormalParameter("output", "T")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
    attributes=[
        onnx.defs.OpSchema.Attribute("spatial_shapes", onnx.defs.OpSchema.AttrType.INTS),
        onnx.defs.OpSchema.Attribute("points", onnx.defs.OpSchema.AttrType.INTS, required=False),
        onnx.defs.OpSchema.Attribute("plugin_namespace", onnx.defs.OpSchema.AttrType.STRING),
        onnx.defs.OpSchema.Attribute("plugin_version", onnx.defs.OpSchema.AttrType.STRING),
    ],
)
_NODE = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), OP_TYPE, _SCHEMA)


def _translate(
    value: Any,
    spatial_shapes: Sequence[int],
    locations: Any,
    weights: Any,
    points: Sequence[int] | None = None,
) -> Any:
    """``torch.ops.detr.ms_deform_attn`` as one node of our domain."""
    return _NODE(value, locations, weights, **node_attributes(spatial_shapes, points))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's own notes, which no user can act on, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_nodes(model: ModelProto) -> None:
    """Names every node ``module.scope/Operator_n``, n counting within the module.

    Precision islands, layer reports of engines and the search for a first deviating layer all speak
    of modules by these names.
    """
    scopes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for node in model.graph.node:
        note = next((x.value for x in node.metadata_props if x.key == _SCOPES), "[]")
        # The last entry is the traced operation itself. What an optimizer has put together has no
        # entries; it belongs to whatever it reads from.
        path = [x for x in ast.literal_eval(note)[:-1] if not x.startswith("_empty")]
        scope = path[-1] if path else ""
        if note == "[]":
            scope = next((scopes[name] for name in node.input if name in scopes), "")
        scopes |= dict.fromkeys(node.output, scope)
        label = f"{scope}/{node.op_type}"
        counts[label] = counts.get(label, -1) + 1
        node.name = f"{label}_{counts[label]}"


def _strip_notes(model: ModelProto) -> None:
    """Removes stack traces and paths: equal weights give equal files on any machine."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def _check(model: ModelProto) -> None:
    found = {node.op_type for node in model.graph.node} & _FORBIDDEN
    if found:
        raise ValueError(f"the graph holds {', '.join(sorted(found))}")
    onnx.checker.check_model(model, full_check=True)
