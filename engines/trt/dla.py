"""The deep learning accelerator of a Jetson: backbone and neck on it, the transformer on the GPU.

The accelerator convolves, pools and adds in FP16 and INT8. A detector's backbone and neck are that
and come first, so the engine crosses over once per feature level; attention, normalization over
channels and look-ups stay on the GPU.
"""

from __future__ import annotations

from typing import Any

import onnx

from detr.errors import UserError

# What keeps a feature map one. A node of another kind ends the front.
_SPATIAL = {
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv",
    "DequantizeLinear", "Identity", "MaxPool", "Mul", "Pad", "QuantizeLinear", "Relu", "Resize",
    "Sigmoid", "Sub",
}  # fmt: skip


def front(model: onnx.ModelProto, image: str = "images") -> list[str]:
    """Names of the nodes of backbone and neck: feature maps made from the image and from weights.

    Args:
        model: A detector's graph.
        image: Name of its input of images.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    maps = {image}
    found = []
    for node in model.graph.node:
        inputs = {name for name in node.input if name}
        # Weights on their way through a quantizer belong to whatever takes them.
        if inputs <= weights and node.op_type in _SPATIAL:
            weights.update(node.output)
        elif node.op_type in _SPATIAL and inputs & maps and inputs <= maps | weights:
            maps.update(node.output)
            found.append(node.name)
    return found


def place(trt: Any, builder: Any, network: Any, config: Any, names: list[str]) -> int:
    """Puts the layers of these nodes on the first accelerator, those it can run; counts them.

    Raises:
        UserError: ``engine-option`` where there is none, or it can run none of them.
    """
    if not builder.num_DLA_cores:
        raise UserError(
            "engine-option", "--dla: no deep learning accelerator on this machine; leave it out"
        )
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    config.default_device_type = trt.DeviceType.GPU
    config.DLA_core = 0
    wanted, count = set(names), 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name in wanted and config.can_run_on_DLA(layer):
            config.set_device_type(layer, trt.DeviceType.DLA)
            count += 1
    if not count:
        raise UserError(
            "engine-option",
            f"--dla: TensorRT {trt.__version__} can run no layer of backbone and neck on the "
            "accelerator here; leave it out",
        )
    return count
