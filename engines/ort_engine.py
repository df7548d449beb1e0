"""ONNX Runtime on the CPU: the reference every other engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime as ort

from detr.data.preprocess import Inputs
from detr.types import FloatArray
from engines.base import Engine, RawDetections
from engines.bundle import Bundle


def session_options(threads: int | None, spinning: bool = True) -> ort.SessionOptions:
    """Options of a session: one operator after the other, each on ``threads`` threads.

    Args:
        threads: Threads within an operator; ``None`` takes one per physical core.
        spinning: Whether idle threads wait busily, which is faster while nothing else wants the
            cores.
    """
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Otherwise signed activations become unsigned ones, whose products with signed weights saturate
    # in 16 bits on processors without VNNI.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    model: Path | onnx.ModelProto,
    options: ort.SessionOptions | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> ort.InferenceSession:
    """Loads a file, or a graph made from one, on the CPU.

    Args:
        model: The graph.
        options: :func:`session_options` on the default number of threads where ``None``.
        disabled_optimizers: Fusions of ONNX Runtime that are left out.
    """
    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model.SerializeToString(),
        options or session_options(None),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(disabled_optimizers),
    )


def show_values(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Makes some values of a graph further outputs.

    Args:
        model: A bundle's graph; changed.
        names: Values; those it does not make, or has as outputs already, are left out.

    Returns:
        The values that are outputs now.
    """
    made = {name for node in model.graph.node for name in node.output}
    infos = {value.name: value for value in model.graph.value_info}
    made -= {value.name for value in model.graph.output}
    shown = [name for name in dict.fromkeys(names) if name in made]
    model.graph.output.extend(infos.get(x, onnx.ValueInfoProto(name=x)) for x in shown)
    return shown


class OrtEngine(Engine):
    """A bundle in ONNX Runtime; the deformable attention runs as the body in the file.

    Args:
        bundle: What to run.
        threads: Threads within an operator.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.info = bundle.info.model
        self.artifact: Path = bundle.model
        self.versions = {
            "onnxruntime": ort.__version__,
            "attention": f"{bundle.info.lowering} body",
        }
        self.batch_size = None if bundle.info.batch == "dynamic" else bundle.info.batch
        self._outputs, self._scaling = bundle.info.outputs, bundle.info.masks
        self._session = self._load(bundle.model, threads)

    def _load(self, model: Path | onnx.ModelProto, threads: int | None) -> ort.InferenceSession:
        """A session for a file, or for a graph made from one."""
        return open_session(model, session_options(threads))

    def intermediates(
        self, inputs: Inputs, names: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]] | None:
        """Values within the graph, from a session that has them as outputs."""
        model = onnx.load(str(self.artifact))
        shown = show_values(model, names)
        session = self._load(model, None)
        return dict(zip(shown, session.run(shown, _feed(inputs)), strict=True))

    def _infer(self, inputs: Inputs) -> RawDetections:
        found = self._session.run(list(self._outputs), _feed(inputs))
        return RawDetections.of(found, inputs, self._scaling)


def _feed(inputs: Inputs) -> dict[str, FloatArray]:
    return {
        "images": inputs.images,
        "valid_sizes": inputs.valid_sizes,
        "original_sizes": inputs.original_sizes,
    }
