"""OpenVINO: its dense layers around our kernels, or around the attention's body in the file.

OpenVINO's ONNX reader lets a Python class stand for an operator it does not know. The class hands
the tensors' own memory to the kernel of :mod:`detr.msda`, so an attention costs what the kernel
costs. It is imported on use, as it is an extra.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner

from detr import msda, winograd
from detr.data.preprocess import Inputs
from detr.errors import UserError
from engines.base import Engine, RawDetections
from engines.bundle import INPUTS, Bundle
from engines.msda_function import DOMAIN, OP_TYPE
from engines.openvino_convolution import conversion, exchange, pays
from engines.openvino_integers import IN_FLOAT, count_from_128, quantized, sums_saturate
from engines.ort_engine import show_values


class OpenVinoEngine(Engine):
    """A bundle in OpenVINO.

    A dynamic batch is compiled anew, and kept, for each size it is run with: that takes seconds,
    but with the size left open OpenVINO copies every operator of ours in every run.

    Args:
        bundle: What to run.
        threads: Threads of OpenVINO's operators and of the kernel; all cores by default.
        device: As OpenVINO names it. The kernel runs on ``CPU``; other devices get the body.

    Raises:
        UserError: ``runtime-missing`` without openvino, ``openvino-device`` where this machine has
            no such device.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int | None = None, device: str = "CPU") -> None:
        openvino = _openvino()
        self.info = bundle.info.model
        self.artifact = bundle.model
        self.on_gpu = device != "CPU"
        self.batch_size = None if bundle.info.batch == "dynamic" else bundle.info.batch
        self._outputs, self._scaling = bundle.info.outputs, bundle.info.masks
        self._core = openvino.Core()
        self._device, self._settings = device, _settings(device, threads)
        if device.split(".")[0] not in {
            name.split(".")[0] for name in self._core.available_devices
        }:
            raise UserError(
                "openvino-device",
                f"engine openvino:{device}: no such device here, only "
                f"{', '.join(self._core.available_devices)}",
            )
        operators: list[Any] = []
        self._kernel = device == "CPU" and msda.native_available()
        if self._kernel:
            attention = f"kernel {msda.instruction_set()}"
            self._core.add_extension(_conversion(operators, threads))
        else:
            attention = f"{bundle.info.lowering} body"
        self.versions = {"openvino": openvino.get_version(), "attention": attention}
        model = onnx.load(str(bundle.model))
        self._from_128 = False
        if device == "CPU" and quantized(model):
            if sums_saturate():
                self._settings |= IN_FLOAT
                self.versions["integers"] = "in float32, since sums of 8-bit products saturate here"
            else:
                self._from_128 = True
                self.versions["integers"] = "counted from 128, since signed ones lose their scale"
        self._convolutions: list[winograd.Convolution] | None = None
        if device == "CPU" and pays():
            self._convolutions = []
            self._core.add_extension(conversion(self._convolutions, operators, threads))
        self._graph = [self._read(model)]
        if self._convolutions:
            self.versions["convolutions"] = "winograd avx2"
        self._requests: dict[int, Any] = {}
        # Operators go last: OpenVINO's halves of them may still ask for ours.
        weakref.finalize(self, _clear, self._requests, self._graph, operators)
        if self.batch_size is not None:
            self._request(self.batch_size)

    def intermediates(
        self, inputs: Inputs, names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]] | None:
        """Values within the graph, from a graph that has them as results; fused less for it."""
        model = onnx.load(str(self.artifact))
        shown = show_values(model, names)
        request = self._compiled(self._read(model), len(inputs.images))
        found = request.infer(_feed(inputs), share_inputs=True)
        values = {name: found[name].copy() for name in shown}
        # Before this frame lets go of the engine: with it go the operators, which they still need.
        del found, request
        return values

    def _read(self, model: onnx.ModelProto) -> Any:
        """OpenVINO's graph of ours."""
        if self._from_128:
            count_from_128(model)
        if self._kernel:
            del model.functions[:]
        else:
            # The reader knows no functions of a model's own.
            model = onnx.inliner.inline_local_functions(model)
        if self._convolutions is not None:
            self._convolutions[:] = exchange(model)
        return self._core.read_model(model.SerializeToString())

    def _request(self, batch: int) -> Any:
        """What runs batches of this size."""
        if batch not in self._requests:
            self._requests[batch] = self._compiled(self._graph[0], batch)
        return self._requests[batch]

    def _compiled(self, graph: Any, batch: int) -> Any:
        graph.reshape({name: [batch, *graph.input(name).partial_shape[1:]] for name in INPUTS})
        return self._core.compile_model(graph, self._device, self._settings).create_infer_request()

    def _infer(self, inputs: Inputs) -> RawDetections:
        found = self._request(len(inputs.images)).infer(_feed(inputs), share_inputs=True)
        return RawDetections.of([found[name] for name in self._outputs], inputs, self._scaling)


def _feed(inputs: Inputs) -> dict[str, Any]:
    return {
        "images": np.ascontiguousarray(inputs.images),
        "valid_sizes": inputs.valid_sizes,
        "original_sizes": inputs.original_sizes,
    }


def _clear(*containers: dict[int, Any] | list[Any]) -> None:
    for container in containers:
        container.clear()


def _settings(device: str, threads: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        # The file says in which precision to compute; by itself OpenVINO takes bfloat16 where the
        # processor has it. Threads tied to one core would hand the tie on to the kernel's own.
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
    return settings


@cache
def _openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise UserError(
            "runtime-missing",
            "engine openvino: OpenVINO is not installed; install it with: "
            'pip install "detr-distillery[openvino]"',
        ) from error
    return openvino


def _conversion(operators: list[Any], threads: int | None) -> Any:
    """Tells OpenVINO's reader to build our operator from each ``detr::MSDeformAttn``.

    Args:
        operators: Takes every operator made, now or by copying; OpenVINO itself keeps none alive.
        threads: For the kernel.
    """
    from openvino.frontend.onnx import ConversionExtension

    operator = _operator()

    def convert(node: Any) -> Any:
        flat = [int(size) for size in node.get_attribute("spatial_shapes")]
        shapes = tuple(zip(flat[::2], flat[1::2], strict=True))
        points = tuple(int(count) for count in node.get_attribute("points", [])) or None
        inputs = [node.get_input(i) for i in range(3)]
        return operator(inputs, (shapes, points), threads, operators).outputs()

    return ConversionExtension(OP_TYPE, DOMAIN, convert)


@cache
def _operator() -> Any:
    """The operator's class; made here because its base comes with openvino."""
    openvino = _openvino()

    class MSDeformAttn(openvino.Op):  # type: ignore[name-defined, misc]
        """Deformable attention of value, locations and weights, see :func:`detr.msda.forward`."""

        def __init__(
            self,
            inputs: Any,
            levels: tuple[tuple[tuple[int, int], ...], tuple[int, ...] | None],
            threads: int | None,
            operators: list[Any],
        ) -> None:
            # OpenVINO's half of an operator holds on to what it is given here for good. With the
            # operator itself, the two would keep each other, and all weights, alive for ever.
            super().__init__(weakref.proxy(self))
            operators.append(self)
            self.levels, self.threads, self.operators = levels, threads, operators
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            value, locations = (self.get_input_partial_shape(i) for i in (0, 1))
            width = value[2].get_length() * value[3].get_length()
            self.set_output_type(
                0,
                self.get_input_element_type(0),
                openvino.PartialShape([locations[0], locations[1], openvino.Dimension(width)]),
            )

        def clone_with_new_inputs(self, new_inputs: Any) -> Any:
            return MSDeformAttn(new_inputs, self.levels, self.threads, self.operators)

        def visit_attributes(self, visitor: Any) -> bool:
            shapes, points = self.levels
            flat = [size for shape in shapes for size in shape]
            visitor.on_attributes({"spatial_shapes": flat, "points": list(points or ())})
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            value, locations, weights = (tensor.data for tensor in inputs)
            shapes, points = self.levels
            out = outputs[0].data
            msda.forward(value, shapes, locations, weights, out, self.threads, points)
            return True

    return MSDeformAttn
