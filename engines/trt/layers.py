"""The layer report of an engine: what each layer is and in which precision it computes.

An engine's layers are not the network's: TensorRT fuses dozens of operators into one kernel. A
GPU's engine inspector tells them as they run; without a GPU some releases tell them in the log of
the build. Where neither does, the report lists the network the builder was given, whose types are
binding because networks are strongly typed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from detr.config import Record
from detr.files import write_atomic
from engines.evidence import LayerSource

LAYERS = "layers.json"

# How the inspector and the log name types, by a word in it; the network's own names.
_TYPES = (
    ("FP32", "FLOAT"),
    ("FP16", "HALF"),
    ("BF16", "BF16"),
    ("BFloat16", "BF16"),
    ("Float", "FLOAT"),
    ("Half", "HALF"),
    ("FP8", "FP8"),
    ("Int8", "INT8"),
    ("Int32", "INT32"),
    ("Int64", "INT64"),
    ("Bool", "BOOL"),
)


class Layer(Record):
    """One layer of the network.

    Attributes:
        name: The ONNX node's.
        kind: TensorRT's kind of layer.
        inputs, outputs: Types of its tensors.
        shape: Of the first output, -1 where it depends on the batch.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shape: tuple[int, ...]


class EngineLayer(Record):
    """One layer of the engine.

    Attributes:
        name: TensorRT's.
        kind: Likewise: ``kgen`` for a kernel generated from fused operators, ``gemm``, ...
        outputs: Types of its outputs.
        nodes: ONNX nodes it computes, as far as TensorRT says.
    """

    name: str
    kind: str
    outputs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


class LayerReport(Record):
    """The file ``layers.json``.

    Attributes:
        source: Who told of the engine's layers: ``engine`` its inspector, ``builder`` the log of
            the build; ``network`` where nobody did, and only the network's layers are known.
        counts: Number of the network's layers by kind and type of the first output.
        layers: The network's layers, constants left out.
        engine_layers: The engine's layers.
        engine: The inspector's own JSON, where the engine could be opened; its keys are the
            release's.
        milliseconds: Mean time per layer of the engine, where it was profiled.
    """

    source: LayerSource = "network"
    counts: dict[str, dict[str, int]]
    layers: tuple[Layer, ...]
    engine_layers: tuple[EngineLayer, ...] = ()
    engine: dict[str, JsonValue] | None = None
    milliseconds: dict[str, float] | None = None

    def write(self, folder: Path) -> None:
        """Writes it beside the engine."""
        write_atomic(folder / LAYERS, self.model_dump_json(indent=1) + "\n")

    @property
    def count(self) -> int:
        """Number of layers of what ``source`` told of."""
        return len(self.layers if self.source == "network" else self.engine_layers)

    @property
    def types(self) -> dict[str, int]:
        """Number of those layers by type of their first output."""
        told: Sequence[Layer | EngineLayer] = (
            self.layers if self.source == "network" else self.engine_layers
        )
        return dict(Counter((one.outputs or ("none",))[0] for one in told).most_common())


def network_layers(network: Any) -> LayerReport:
    """Describes a parsed network."""
    layers = []
    counts: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "CONSTANT":
            continue
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        tensors = [tensor for tensor in outputs if tensor is not None]
        layers.append(
            Layer(
                name=layer.name,
                kind=layer.type.name,
                # An optional input that is not given is None.
                inputs=tuple(tensor.dtype.name for tensor in inputs if tensor is not None),
                outputs=tuple(tensor.dtype.name for tensor in tensors),
                shape=tuple(tensors[0].shape) if tensors else (),
            )
        )
        first = tensors[0].dtype.name if tensors else "none"
        counts.setdefault(layer.type.name, Counter())[first] += 1
    return LayerReport(
        counts={kind: dict(by_type) for kind, by_type in sorted(counts.items())},
        layers=tuple(layers),
    )


def with_log(report: LayerReport, lines: Iterable[str]) -> LayerReport:
    """Adds the engine's layers as the builder listed them, one a line; unchanged without any."""
    told = tuple(_logged(line) for line in lines)
    if not told:
        return report
    return report.model_copy(update={"source": "builder", "engine_layers": told})


def _logged(line: str) -> EngineLayer:
    """``Name: N, LayerType: K, Inputs: [...], Outputs: [...], ..., Metadata: [ONNX Layer: a]``."""
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    kind = re.match(r"\w*", rest)
    outputs = re.search(r", Outputs: \[ (\{.*?\})\]", rest)
    types = re.findall(r"Datatype: ([^,}]+)", outputs[1]) if outputs else []
    nodes = re.search(r"Metadata: (.*)$", rest)
    return EngineLayer(
        name=name,
        kind=kind[0] if kind else "",
        outputs=tuple(_type(text) for text in types),
        nodes=_nodes(nodes[1]) if nodes else (),
    )


def with_engine(report: LayerReport, trt: Any, engine: Any) -> LayerReport:
    """Adds what the inspector tells of an opened engine."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        told = json.loads(text)
        layers = tuple(_inspected(one) for one in told["Layers"])
    except (ValueError, KeyError, TypeError, AttributeError):
        # An engine is not to be lost over its description.
        return report.model_copy(update={"engine": {"not understood": text}})
    return report.model_copy(update={"source": "engine", "engine_layers": layers, "engine": told})


def _inspected(told: Any) -> EngineLayer:
    if isinstance(told, str):  # an engine built to tell names only
        return EngineLayer(name=told, kind="")
    types = (out.get("Datatype") or out["Format/Datatype"] for out in told.get("Outputs", ()))
    return EngineLayer(
        name=told["Name"],
        kind=told.get("LayerType", ""),
        outputs=tuple(_type(text) for text in types),
        nodes=_nodes(told.get("Metadata", "")),
    )


def _type(text: str) -> str:
    return next((name for word, name in _TYPES if word.lower() in text.lower()), text.strip())


def _nodes(metadata: str) -> tuple[str, ...]:
    """The nodes of ``[ONNX Layer: a][ONNX Layer: b]``, whatever stands between."""
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))
