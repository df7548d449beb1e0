"""Our CPU engine: ONNX Runtime for everything but deformable attention, our kernel for that.

The graph is cut at its attention nodes (:mod:`engines.split`); the pieces run as ONNX Runtime
sessions one after the other and the kernel of :mod:`detr.msda` runs between them, on the very
memory ONNX Runtime wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from detr import msda
from detr.data.preprocess import Inputs
from detr.types import FloatArray
from engines.base import Engine, RawDetections
from engines.bundle import Bundle
from engines.ort_engine import open_session, session_options, show_values
from engines.split import Attention, Segment, last_uses, split


class _Piece:
    """A segment, loaded."""

    def __init__(self, segment: Segment, threads: int | None) -> None:
        self._outputs = segment.outputs
        self._inputs = segment.inputs
        # A session that waits busily would take the cores from the kernel and from the next
        # session, whose own threads these are not.
        self._session = open_session(
            segment.model,
            session_options(threads, spinning=False),
            # Its fused Add and LayerNorm is several times slower than the two alone.
            disabled_optimizers=["SkipLayerNormFusion"],
        )

    def run(self, values: dict[str, ort.OrtValue]) -> None:
        """Reads its inputs from ``values`` and adds its outputs; nothing is copied."""
        binding = self._session.io_binding()
        for name in self._inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values.update(zip(self._outputs, binding.get_outputs(), strict=True))


_Step = tuple[_Piece, "Attention | None", list[str]]


def _load(model: onnx.ModelProto, threads: int | None, keep: bool = False) -> list[_Step]:
    """The pieces of a graph, each with what follows it and with the values no longer needed then.

    Args:
        model: The graph; its outputs are kept in any case.
        threads: Threads within an operator.
        keep: Whether every value that crosses a cut is kept, too.
    """
    parts = split(model)
    return [
        (_Piece(segment, threads), attention, [] if keep else last)
        for (segment, attention), last in zip(parts, last_uses(parts), strict=True)
    ]


class NativeEngine(Engine):
    """A bundle on the CPU, with the deformable attention in our kernel.

    Args:
        bundle: What to run.
        threads: Threads of ONNX Runtime's operators and of the kernel.
    """

    name = "native"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.info = bundle.info.model
        self.artifact = bundle.model
        self.versions = {
            "onnxruntime": ort.__version__,
            "attention": f"kernel {msda.instruction_set()}",
        }
        self.batch_size = None if bundle.info.batch == "dynamic" else bundle.info.batch
        self._outputs, self._scaling = bundle.info.outputs, bundle.info.masks
        self._threads = threads
        self._kept: dict[str, FloatArray] = {}
        self._steps = _load(onnx.load(str(bundle.model)), threads)

    def intermediates(
        self, inputs: Inputs, names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]] | None:
        """Values within the graph, from pieces that hand them out; the kernel runs between them."""
        model = onnx.load(str(self.artifact))
        shown = show_values(model, names)
        values = self._run(_load(model, self._threads, keep=True), inputs)
        return {name: values[name].numpy() for name in shown}

    def _infer(self, inputs: Inputs) -> RawDetections:
        values = self._run(self._steps, inputs)
        found = [values[name].numpy() for name in self._outputs]
        return RawDetections.of(found, inputs, self._scaling)

    def _run(self, steps: Sequence[_Step], inputs: Inputs) -> dict[str, ort.OrtValue]:
        """The values left over at the end."""
        values = {
            "images": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs.images)),
            "valid_sizes": ort.OrtValue.ortvalue_from_numpy(inputs.valid_sizes),
            "original_sizes": ort.OrtValue.ortvalue_from_numpy(inputs.original_sizes),
        }
        for piece, attention, last in steps:
            piece.run(values)
            if attention is not None:
                values[attention.output] = self._attend(attention, values)
            for name in last:
                # Gives the memory back to the session that made it, for its next run.
                del values[name]
        return values

    def _attend(self, attention: Attention, values: dict[str, ort.OrtValue]) -> ort.OrtValue:
        value, locations, weights = (
            _view(values[name])
            for name in (attention.value, attention.locations, attention.weights)
        )
        # A large array taken anew for each call costs more in page faults than in arithmetic.
        kept = self._kept.get(attention.output)
        if kept is not None and kept.shape[:2] != locations.shape[:2]:
            kept = None
        out = msda.forward(
            value, attention.shapes, locations, weights, kept, self._threads, attention.points
        )
        self._kept[attention.output] = out
        return ort.OrtValue.ortvalue_from_numpy(out)


def _view(value: ort.OrtValue) -> Any:
    """The array an OrtValue holds, without a copy (its own ``numpy()`` makes one)."""
    return np.from_dlpack(value._get_c_value())
