"""Mistakes of the field, each as a change of an exported graph, of its sidecar or of its engine.

``tests/export/parity/test_gate_faults.py`` holds the gate to seeing them; ``tools/gate.py`` prints
how far above the budget each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from detr.config import ClassMap
from detr.data import open_dataset
from detr.data.preprocess import Inputs, PreprocessConfig, preprocess
from detr.data.synth.write import generate
from detr.model_info import BundledInfo
from detr.types import ImageArray
from engines.bundle import MODEL, Bundle
from engines.msda_function import HeadShape, is_attention, set_lowering
from engines.ort_engine import OrtEngine
from engines.torch_engine import TorchEngine
from engines.verdict import EngineVerdict
from export.parity.budget import default_budget
from export.parity.engines import engine_verdicts
from export.parity.samples import Samples
from tools.graph_edits import (
    attribute,
    constant,
    in_module,
    insert_behind,
    replace_output,
    samplers,
    weight,
)

Change = Callable[[ModelProto], None]
Sidecar = Callable[[BundledInfo], BundledInfo]


def sampler_option(name: str, value: Any) -> Change:
    def change(model: ModelProto) -> None:
        for node in samplers(model):
            attribute(node, name, value)

    return change


def half_pixel(model: ModelProto) -> None:
    """The half pixel between cell centers and cell edges is forgotten (gather body)."""
    regather(model)
    for node in model.functions[0].node:
        if node.op_type == "Constant":
            value = numpy_helper.to_array(node.attribute[0].t)
            if value.shape == () and value.dtype == np.float32 and value == 0.5:
                attribute(node, "value", numpy_helper.from_array(np.zeros((), np.float32)))


def regather(model: ModelProto) -> None:
    set_lowering(model, HeadShape(4, 32, 4), "gather")


def swapped_locations(model: ModelProto) -> None:
    order = constant(model.graph, "swapped", [1, 0], np.int64)
    for k, node in enumerate([node for node in model.graph.node if is_attention(node)]):
        swap = helper.make_node("Gather", [node.input[1], order], [f"swapped_{k}"], axis=5)
        insert_behind(model.graph, node.input[1], swap)


def reversed_levels(model: ModelProto) -> None:
    order = constant(model.graph, "reversed", [3, 2, 1, 0], np.int64)
    for k, node in enumerate([node for node in model.graph.node if is_attention(node)]):
        for position in (1, 2):
            name = node.input[position]
            turned = helper.make_node("Gather", [name, order], [f"turned_{k}_{position}"], axis=3)
            insert_behind(model.graph, name, turned)


def swapped_boxes(model: ModelProto) -> None:
    order = constant(model.graph, "order", [1, 0, 3, 2], np.int64)
    replace_output(
        model.graph,
        "boxes",
        helper.make_node("Gather", ["boxes_before", order], ["boxes"], axis=2),
    )


def no_valid_ratios(model: ModelProto) -> None:
    """Every image is taken to fill the canvas."""
    graph = model.graph
    canvas = constant(graph, "canvas", [[96.0, 320.0]])
    insert_behind(
        graph,
        "valid_sizes",
        helper.make_node("Max", ["valid_sizes", canvas], ["whole_canvas"]),
    )


def double_sigmoid(model: ModelProto) -> None:
    replace_output(
        model.graph, "scores", helper.make_node("Sigmoid", ["scores_before"], ["scores"])
    )


def cut(count: int) -> Change:
    def change(model: ModelProto) -> None:
        graph = model.graph
        bounds = [
            constant(graph, name, [value], np.int64)
            for name, value in (("cut_start", 0), ("cut_end", count), ("cut_axis", 1))
        ]
        for output in ("boxes", "scores", "labels"):
            replace_output(
                graph, output, helper.make_node("Slice", [f"{output}_before", *bounds], [output])
            )
        for value in graph.output:
            value.type.tensor_type.shape.dim[1].dim_value = count

    return change


def class_off_by_one(model: ModelProto) -> None:
    one = constant(model.graph, "one_class", 1, np.int64)
    replace_output(
        model.graph, "labels", helper.make_node("Add", ["labels_before", one], ["labels"])
    )


def bgr(model: ModelProto) -> None:
    order = constant(model.graph, "bgr", [2, 1, 0], np.int64)
    insert_behind(
        model.graph, "images", helper.make_node("Gather", ["images", order], ["turned"], axis=1)
    )


def norm_in_half(model: ModelProto) -> None:
    """A LayerNorm in single operators, whose squares overflow as they do in half precision.

    The overflow is written out: ONNX Runtime computes half precision in single on the CPU. The
    input is scaled first, which a LayerNorm does not see, to the size activations of large
    detectors have by themselves.
    """
    graph = model.graph
    node = in_module(model, "encoder.layers.1.ffn.norm", "LayerNormalization")
    x, scale, bias = node.input
    at = list(graph.node).index(node)
    width = float(numpy_helper.to_array(weight(model, scale)).size)
    c = {
        name: constant(graph, f"half_{name}", value)
        for name, value in (
            ("factor", 256.0),
            ("width", width),
            ("tiny", 1e-5),
            ("limit", 65504.0),
            ("infinity", np.inf),
        )
    }
    axis = constant(graph, "half_axis", [-1], np.int64)
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Mul", [x, c["factor"]], "big", {}),
        ("ReduceMean", ["h_big"], "mean", {"axes": [-1]}),
        ("Sub", ["h_big", "h_mean"], "centerd", {}),
        ("Mul", ["h_centerd", "h_centerd"], "square", {}),
        ("Greater", ["h_square", c["limit"]], "over", {}),
        ("Where", ["h_over", c["infinity"], "h_square"], "back", {}),
        ("ReduceSum", ["h_back", axis], "sum", {}),
        ("Div", ["h_sum", c["width"]], "variance", {}),
        ("Add", ["h_variance", c["tiny"]], "safe", {}),
        ("Sqrt", ["h_safe"], "root", {}),
        ("Div", ["h_centerd", "h_root"], "normed", {}),
        ("Mul", ["h_normed", scale], "scaled", {}),
    ]
    nodes = [
        helper.make_node(op, inputs, [f"h_{out}"], f"encoder.layers.1.ffn.norm/{op}_{k}", **options)
        for k, (op, inputs, out, options) in enumerate(steps)
    ]
    nodes.append(
        helper.make_node("Add", ["h_scaled", bias], node.output, "encoder.layers.1.ffn.norm/Add")
    )
    graph.node.remove(node)
    for offset, new in enumerate(nodes):
        graph.node.insert(at + offset, new)


def stale_weight(model: ModelProto) -> None:
    """One matrix as it was some steps earlier: three percent away."""
    node = in_module(model, "decoder.layers.1.cross_attention.value_proj", "MatMul")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    array = numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).normal(size=array.shape) * array.std()
    tensor.CopyFrom(numpy_helper.from_array((array + 0.03 * noise).astype(np.float32), tensor.name))


def nan_bias(model: ModelProto) -> None:
    tensor = weight(model, "decoder.box_heads.2.layers.0.bias")
    array = numpy_helper.to_array(tensor).copy()
    array[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def frozen_batch(model: ModelProto) -> None:
    """A batch of one traced into a Reshape, so that two images cannot pass."""
    shape = constant(model.graph, "frozen", [1, 3, 96, 320], np.int64)
    insert_behind(
        model.graph, "images", helper.make_node("Reshape", ["images", shape], ["frozen_images"])
    )


def first_of_batch(model: ModelProto) -> None:
    """Every image of a batch is given the first one's picture."""
    graph = model.graph
    first = constant(graph, "first", [0], np.int64)
    insert_behind(
        graph,
        "images",
        helper.make_node("Gather", ["images", first], ["first_image"], axis=0),
        helper.make_node("Shape", ["images"], ["batch_shape"]),
        helper.make_node("Expand", ["first_image", "batch_shape"], ["first_images"]),
    )


def identity(_model: ModelProto) -> None:
    """Nothing."""


class Centered(OrtEngine):
    """Letterboxes into the middle of the canvas where the model expects the top left corner."""

    def prepare(self, images: Sequence[ImageArray]) -> Inputs:
        inputs = super().prepare(images)
        for k, (height, width) in enumerate(inputs.valid_sizes.astype(int)):
            down = (inputs.images.shape[2] - height) // 2
            right = (inputs.images.shape[3] - width) // 2
            inputs.images[k] = np.roll(inputs.images[k], (down, right), (1, 2))
        return inputs


class Bare(OrtEngine):
    """Scales without interpolation."""

    def prepare(self, images: Sequence[ImageArray]) -> Inputs:
        inputs = super().prepare(images)
        small = []
        for image, (height, width) in zip(images, inputs.valid_sizes.astype(int), strict=True):
            rows = np.arange(height) * image.shape[0] // height
            columns = np.arange(width) * image.shape[1] // width
            small.append(image[rows][:, columns])
        plain = preprocess(small, self.info.preprocess)
        return Inputs(plain.images, inputs.valid_sizes, inputs.original_sizes)


def as_it_is(info: BundledInfo) -> BundledInfo:
    """What the exporter wrote."""
    return info


def preprocessing(change: Callable[[PreprocessConfig], dict[str, Any]]) -> Sidecar:
    """Changes how the sidecar says images are prepared."""
    return lambda info: info.model_copy(
        update={"preprocess": info.preprocess.model_copy(update=change(info.preprocess))}
    )


def renamed(info: BundledInfo) -> BundledInfo:
    """The last class comes first, as when a data set's list was sorted; all indices stay."""
    names, ids = info.classes.names, info.classes.category_ids
    classes = ClassMap(names=names[-1:] + names[:-1], category_ids=ids[-1:] + ids[:-1])
    return info.model_copy(update={"classes": classes})


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        change: What it does to the graph.
        engine: What it does to the images, as an engine.
        sidecar: What it does to what the sidecar says of the model.
        masks: What it does to what the sidecar says of masks.
        layer: Where the gate must say it begins, a prefix; empty where it cannot know.
        pitfall: The known mistake it must be told as; empty for whichever.
    """

    change: Change = identity
    engine: type[OrtEngine] = OrtEngine
    sidecar: Sidecar = as_it_is
    masks: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""
    pitfall: str = ""


FAULTS = {
    "half-pixel shift": Fault(half_pixel, layer="encoder.layers.0.attention"),
    "align_corners": Fault(
        sampler_option("align_corners", 1),
        layer="encoder.layers.0.attention",
        pitfall="sampling-convention",
    ),
    "border for zero padding": Fault(
        sampler_option("padding_mode", "border"),
        layer="encoder.layers.0.attention",
        pitfall="sampling-convention",
    ),
    "nearest for bilinear": Fault(
        sampler_option("mode", "nearest"),
        layer="encoder.layers.0.attention",
        pitfall="sampling-convention",
    ),
    "x and y of locations swapped": Fault(
        swapped_locations, layer="encoder.layers.0.attention", pitfall="sampling-convention"
    ),
    "levels in reverse order": Fault(
        reversed_levels, layer="encoder.layers.0.attention", pitfall="sampling-convention"
    ),
    "x and y of boxes swapped": Fault(swapped_boxes, layer="decode", pitfall="box-format"),
    "no valid ratios": Fault(no_valid_ratios, layer="encoder", pitfall="image-sizes"),
    "sigmoid twice": Fault(double_sigmoid, layer="decode", pitfall="score-function"),
    "three detections kept": Fault(cut(3), layer="decode", pitfall="lost-detections"),
    "90 of 100 detections kept": Fault(cut(90), layer="decode", pitfall="lost-detections"),
    "class index off by one": Fault(class_off_by_one, layer="decode", pitfall="class-map"),
    "class names in another order": Fault(sidecar=renamed, pitfall="class-map"),
    "mean and std swapped": Fault(
        sidecar=preprocessing(lambda p: {"mean": p.std, "std": p.mean}),
        layer="preprocessing",
        pitfall="other-preprocessing",
    ),
    "mean and std of BGR": Fault(
        sidecar=preprocessing(lambda p: {"mean": p.mean[::-1], "std": p.std[::-1]}),
        layer="preprocessing",
        pitfall="channel-order",
    ),
    "BGR": Fault(bgr, layer="backbone", pitfall="input-channels"),
    "letterbox in the middle": Fault(
        engine=Centered, layer="preprocessing", pitfall="other-preprocessing"
    ),
    "scaled without interpolation": Fault(engine=Bare, layer="preprocessing"),
    "LayerNorm overflows in half": Fault(
        norm_in_half, layer="encoder.layers.1.ffn", pitfall="layernorm-in-half"
    ),
    "stale weight": Fault(
        stale_weight,
        layer="decoder.layers.1.cross_attention.value_proj",
        pitfall="other-weights",
    ),
    "NaN in a bias": Fault(nan_bias, layer="decoder.box_heads.2", pitfall="not-a-number"),
    "batch frozen at one": Fault(frozen_batch, pitfall="frozen-batch"),
    "first image for all of a batch": Fault(first_of_batch, pitfall="frozen-batch"),
}


def faulty_verdict(
    fault: Fault, healthy: Bundle, folder: Path, reference: TorchEngine, samples: Samples
) -> EngineVerdict:
    """The gate's verdict on a bundle with one fault."""
    model = onnx.load(str(healthy.model))
    fault.change(model)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / MODEL))
    changed: dict[str, Any] = {"model": fault.sidecar(healthy.info.model)}
    if healthy.info.masks is not None:
        changed["masks"] = healthy.info.masks.model_copy(update=dict(fault.masks))
    bundle = Bundle(folder, healthy.info.model_copy(update=changed))
    engine = fault.engine(bundle, 1)
    return engine_verdicts(bundle, reference, [engine], samples, default_budget("fp32"))[0]


def scenes(folder: Path, count: int, reference: TorchEngine) -> Samples:
    """Labeled scenes that do not fill the canvas, with what torch finds in them."""
    generate(folder, count, (128, 352), seed=11, val_fraction=0.5)
    samples = Samples.of_dataset(open_dataset(f"kitti:{folder}", reference.info.classes))
    detections = [reference([samples.image(k)])[0] for k in range(len(samples))]
    return replace(samples, detections=detections)
