"""A bundle for NVIDIA DeepStream: what the element ``nvinfer`` reads, and a parser it loads.

``nvinfer`` hands a network one input, pixels scaled to fit and padded on the right and below, and
knows one standard deviation for all channels. So the graph written here normalizes by itself, puts
zeros where padding is, and knows the size of the frames. Its one output is ``detections``,
``[B, T, 6]`` float32: box in pixels of the network's input, score and class. Where all outputs
begin with the batch and have one type, ``nvinfer`` finds every frame's part of them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from detr.data.preprocess import PreprocessConfig
from detr.files import output_error, output_folder, write_atomic
from engines.bundle import MODEL, Bundle, BundleInfo
from engines.external_weights import save_with_weights
from engines.trt.lowering import lowered_model
from export.deploy.graph_alone import check_boxes_alone, check_graph_alone

CONFIG = "config_infer.txt"
LABELS = "labels.txt"
PARSER = Path(__file__).with_name("deepstream_parser")

# nvinfer's numbers of precisions.
_MODES = {"fp32": 0, "int8": 1, "fp16": 2}
_NETWORK_INPUT, _DETECTIONS = "frames", "detections"


@dataclass(frozen=True)
class DeepStream:
    """What was written.

    Attributes:
        folder: Where.
        batch: Frames ``nvinfer`` puts together.
        frame: Height and width of the frames the graph expects.
    """

    folder: Path
    batch: int
    frame: tuple[int, int]


def write_deepstream(
    bundle: Bundle, out: Path, frame: tuple[int, int], batch: int = 1, score: float = 0.3
) -> DeepStream:
    """Writes configuration, labels, graph and the parser's sources.

    Args:
        bundle: What to run.
        out: Folder.
        frame: Height and width of the frames that come in; of streams of other sizes, those with
            this aspect are right, too.
        batch: Frames at once; of a bundle of a fixed batch, its own.
        score: Detections that score less are dropped.

    Raises:
        UserError: ``deploy-nms``, ``deploy-masks``, or the folder is not writable or the disk is
            full.
    """
    check_graph_alone(bundle, "nvinfer")
    check_boxes_alone(bundle, "the parser for nvinfer")
    output_folder(out)
    if bundle.info.batch != "dynamic":
        batch = bundle.info.batch
    model = frames_to_detections(bundle, frame)
    try:
        (out / f"{MODEL}.data").unlink(missing_ok=True)
        save_with_weights(model, out / MODEL)
        for source in PARSER.iterdir():
            shutil.copyfile(source, out / source.name)
    except OSError as error:
        raise output_error(out, error) from error
    write_atomic(out / LABELS, "\n".join(bundle.info.model.classes.names) + "\n")
    write_atomic(out / CONFIG, config_text(bundle, batch, score))
    return DeepStream(out, batch, frame)


def frames_to_detections(bundle: Bundle, frame: tuple[int, int]) -> onnx.ModelProto:
    """The bundle's graph from padded frames ``[B, 3, H, W]`` (RGB, 0 to 255) to ``detections``."""
    model = lowered_model(bundle, "gather")
    config = bundle.info.model.preprocess
    nodes, weights = _front(config, frame)
    cast = helper.make_node("Cast", ["labels"], ["deepstream/labels"], to=TensorProto.FLOAT)
    columns = [
        helper.make_node("Unsqueeze", [name, "deepstream/last"], [f"deepstream/{name}_column"])
        for name in ("scores", "deepstream/labels")
    ]
    parts = ["boxes", *(node.output[0] for node in columns)]
    joined = helper.make_node("Concat", parts, [_DETECTIONS], axis=2)
    nodes = [*nodes, *model.graph.node, cast, *columns, joined]
    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    size: int | str = batch.dim_value or batch.dim_param
    found = next(o for o in graph.output if o.name == "scores").type.tensor_type.shape.dim[1]
    single = TensorProto.FLOAT
    frames = helper.make_tensor_value_info(_NETWORK_INPUT, single, [size, 3, *config.canvases[0]])
    detections = helper.make_tensor_value_info(_DETECTIONS, single, [size, found.dim_value, 6])
    for field, value in (("node", nodes), ("input", [frames]), ("output", [detections])):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(value)
    graph.initializer.extend(weights)
    onnx.checker.check_model(model)
    return model


def _front(
    config: PreprocessConfig, frame: tuple[int, int]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """From frames to the graph's own three inputs."""
    height, width = config.canvases[0]
    valid = config.scaled(*frame)
    constants: dict[str, npt.NDArray[np.generic]] = {
        "mean": np.array(config.mean, np.float32).reshape(1, 3, 1, 1),
        "scale": (1 / np.array(config.std, np.float32)).reshape(1, 3, 1, 1),
        "lines": (np.arange(height) < valid[0]).astype(np.float32).reshape(1, 1, -1, 1),
        "columns": (np.arange(width) < valid[1]).astype(np.float32).reshape(1, 1, 1, -1),
        "valid": np.array([valid], np.float32),
        "two": np.array([2], np.int64),
        "last": np.array([-1], np.int64),
    }
    weights = [numpy_helper.from_array(v, f"deepstream/{name}") for name, v in constants.items()]
    steps = [
        ("Sub", [_NETWORK_INPUT, "mean"], "shifted"),
        ("Mul", ["shifted", "scale"], "scaled"),
        # Padding is zero after the normalization, not black before it.
        ("Mul", ["scaled", "lines"], "cut"),
        ("Mul", ["cut", "columns"], "images"),
        ("Shape", [_NETWORK_INPUT], "batch"),
        ("Concat", ["batch", "two"], "shape"),
        # Boxes are wanted in pixels of the network's input, of which the frame is the valid part.
        ("Expand", ["valid", "shape"], "valid_sizes"),
        ("Identity", ["valid_sizes"], "original_sizes"),
    ]
    outer = {_NETWORK_INPUT, "images", "valid_sizes", "original_sizes"}
    attributes: dict[str, dict[str, Any]] = {
        "Shape": {"start": 0, "end": 1},
        "Concat": {"axis": 0},
    }

    def name(of: str) -> str:
        return of if of in outer else f"deepstream/{of}"

    nodes = [
        helper.make_node(
            kind, [name(i) for i in inputs], [name(output)], f"deepstream/{output}",
            **attributes.get(kind, {}),
        )
        for kind, inputs, output in steps
    ]  # fmt: skip
    return nodes, weights


def config_text(bundle: Bundle, batch: int, score: float) -> str:
    """The content of ``config_infer.txt``; keys are those of the element ``nvinfer``."""
    info = bundle.info
    height, width = info.model.preprocess.canvases[0]
    engine = f"model_b{batch}_gpu0_{info.precision}.engine"
    typed = (
        "# nvinfer builds this engine at its first start."
        if info.precision == "fp32"
        else f"# nvinfer would type the layers anew. Build the engine with the graph's own types:\n"
        f"#   trtexec --onnx={MODEL} --stronglyTyped --saveEngine={engine}"
        + (
            ""
            if info.batch != "dynamic"
            else f" \\\n#     --minShapes={_shape(1, info)} "
            f"--optShapes={_shape(batch, info)} --maxShapes={_shape(batch, info)}"
        )
    )
    return f"""# {bundle.path.name} for DeepStream's nvinfer; the parser beside it is built with:
#   cmake -S . -B build && cmake --build build
[property]
gpu-id=0
process-mode=1
network-type=0
# The graph normalizes by itself.
model-color-format=0
net-scale-factor=1
infer-dims=3;{height};{width}
maintain-aspect-ratio=1
symmetric-padding=0
onnx-file={MODEL}
{typed}
model-engine-file={engine}
network-mode={_MODES[info.precision]}
batch-size={batch}
num-detected-classes={len(info.model.classes)}
labelfile-path={LABELS}
custom-lib-path=libnvdsinfer_detr.so
parse-bbox-func-name=NvDsInferParseDetr
# Detections are final: no clustering.
cluster-mode=4
interval=0
gie-unique-id=1

[class-attrs-all]
pre-cluster-threshold={score}
topk={info.model.detections}
"""


def _shape(batch: int, info: BundleInfo) -> str:
    size = info.model.preprocess.canvases[0]
    return f"{_NETWORK_INPUT}:{batch}x3x{size[0]}x{size[1]}"
