"""How large the values inside a graph get on real images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, TensorProto, helper

from detr.cli_support import progress
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.types import ImageArray
from engines.ort_engine import open_session
from export.precision.node_kinds import Network


def value_ranges(
    model: ModelProto, images: Sequence[ImageArray], config: PreprocessConfig, batch: int
) -> dict[str, float]:
    """Largest magnitude of every float value; infinite where a mask put infinities in.

    The maxima are taken inside the graph, so that no intermediate map is ever handed out.

    Args:
        model: A float32 graph; left as it is.
        images: ``[h, w, 3]`` uint8 RGB.
        config: How the model wants its images.
        batch: Images per run.
    """
    probed = ModelProto()
    probed.CopyFrom(model)
    network = Network(probed)
    names = [x for node in network.nodes for x in node.output if network.is_float(x)]
    for index, name in enumerate(names):
        probed.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"abs\0{index}"]),
                helper.make_node("ReduceMax", [f"abs\0{index}"], [f"max\0{index}"], keepdims=0),
            ]
        )
    outputs = [f"max\0{index}" for index in range(len(names))]
    probed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs
    )
    session = open_session(probed)
    largest = np.zeros(len(names))
    for start in progress(range(0, len(images), batch), "measuring ranges"):
        feed = preprocess(fill(images[start : start + batch], batch), config)
        found = session.run(outputs, vars(feed))
        largest = np.maximum(largest, np.array(found, np.float64))
    return dict(zip(names, map(float, largest), strict=True))


def fill(images: Sequence[ImageArray], batch: int) -> list[ImageArray]:
    """A batch of the size a static graph wants; the last image stands in for missing ones."""
    return [*images, *[images[-1]] * (batch - len(images))]
