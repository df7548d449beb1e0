"""The layer report of an engine: what each layer is and in which precision it computes.

A GPU's engine inspector tells the fused layers as they run. Without a GPU an engine cannot even be
opened; the report then lists the network the builder was given, whose types are binding because
networks are strongly typed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from detr.config import Strict
from detr.files import write_atomic
from engines.evidence import LayerSource

LAYERS = "layers.json"


class Layer(Strict):
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


class LayerReport(Strict):
    """The file ``layers.json``.

    Attributes:
        source: ``engine``: fused layers, told by the inspector; ``network``: as handed to the
            builder.
        counts: Number of layers by kind and type of the first output.
        layers: The network's layers, constants left out.
        engine: The inspector's own JSON, where the engine could be opened; its keys are the
            release's.
        milliseconds: Mean time per layer, where it was profiled.
    """

    source: LayerSource = "network"
    counts: dict[str, dict[str, int]]
    layers: tuple[Layer, ...]
    engine: dict[str, JsonValue] | None = None
    milliseconds: dict[str, float] | None = None

    def write(self, folder: Path) -> None:
        """Writes it beside the engine."""
        write_atomic(folder / LAYERS, self.model_dump_json(indent=1) + "\n")

    @property
    def types(self) -> dict[str, int]:
        """Number of layers by type of their first output."""
        total: Counter[str] = Counter()
        for kinds in self.counts.values():
            total.update(kinds)
        return dict(total.most_common())


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


def with_engine(report: LayerReport, trt: Any, engine: Any) -> LayerReport:
    """Adds what the inspector tells of an opened engine."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        inspected = json.loads(text)
    except ValueError:  # an engine is not to be lost over its description
        inspected = {"not JSON": text}
    return report.model_copy(update={"source": "engine", "engine": inspected})
