"""Ways to compute deformable attention, each ready to be timed on the same inputs.

Every contender is built for one problem (model compiled, session made, tensors moved) and then only
runs; what it returns is numpy, for the check against the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.op.replay import Replay, copies_needed
from detr import msda
from detr.errors import UserError
from engines.msda_function import HeadShape, Lowering, make_node, set_lowering

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of one attention.

    Attributes:
        shapes: (height, width) of each level, finest first.
        value: ``[B, S, M, D]`` float32, float16 or (numpy extension type) bfloat16.
        locations: ``[B, Q, M, V, P, 2]`` float32.
        weights: ``[B, Q, M, V, P]`` float32.
        grad_out: ``[B, Q, M * D]``, value's type.
        threads: For every contender that can be told.
    """

    shapes: tuple[tuple[int, int], ...]
    value: Array
    locations: Array
    weights: Array
    grad_out: Array
    threads: int

    @property
    def dtype(self) -> str:
        return str(self.value.dtype)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        forward: Runs it once.
        result: What the last ``forward`` computed, ``[B, Q, M * D]``.
        both: Forward and backward; ``None`` where it cannot.
        version: Of the runtime.
        device_memory: Peak bytes of device memory since the last call of it; ``None`` on the CPU.
        replay: Milliseconds of one forward call on the device, anew with each call of it;
            ``None`` on the CPU, where :attr:`forward` is timed itself.
        replay_both: The same, forward and backward.
    """

    forward: Callable[[], object]
    result: Callable[[], Array]
    both: Callable[[], object] | None
    version: str
    device_memory: Callable[[], int] | None = None
    replay: Callable[[], float] | None = None
    replay_both: Callable[[], float] | None = None


class Unavailable(Exception):
    """This contender cannot take part; the message says why."""


def native(problem: AttentionInputs) -> Contender:
    """The compiled kernel, called without torch.

    Raises:
        Unavailable: It was not compiled.
    """
    if not msda.native_available():
        raise Unavailable("not compiled: no C++ compiler when detr was installed")
    p = problem
    inputs = (p.value, p.shapes, p.locations, p.weights)
    latest: list[Array] = []

    def forward() -> None:
        latest[:] = [msda.forward(*inputs, threads=p.threads)]

    def both() -> None:
        forward()
        msda.backward(p.grad_out, *inputs, threads=p.threads)

    return Contender(forward, lambda: latest[0], both, f"detr {msda.instruction_set()}")


def torch_op(problem: AttentionInputs, device: str) -> Contender:
    """The same kernel as the torch operator models use, with autograd."""
    from detr.models.attention.ms_deform_attn import ms_deform_attn

    return _torch(problem, device, ms_deform_attn)


def torch_grid_sample(problem: AttentionInputs, device: str) -> Contender:
    """The usual formulation in torch: one ``grid_sample`` per level."""
    from detr.models.attention.ms_deform_attn import ms_deform_attn_reference

    return _torch(problem, device, ms_deform_attn_reference)


def _torch(problem: AttentionInputs, device: str, attention: Callable[..., Any]) -> Contender:
    import torch

    torch.set_num_threads(problem.threads)
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    kind = kinds[problem.dtype]
    value, locations, weights, grad_out = (
        torch.from_numpy(array.astype(np.float32)).to(device)
        for array in (problem.value, problem.locations, problem.weights, problem.grad_out)
    )
    leaves = [value.to(kind), locations, weights]
    grad_out = grad_out.to(kind)
    latest: list[Any] = []

    def once(inputs: list[Any]) -> Any:
        with torch.no_grad():
            return attention(inputs[0], problem.shapes, inputs[1], inputs[2])

    def once_both(tensors: list[Any]) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attention(inputs[0], problem.shapes, inputs[1], inputs[2])
        return torch.autograd.grad(out, inputs, grad_out)

    def forward() -> None:
        latest[:] = [once(leaves)]

    def both() -> None:
        once_both(leaves)

    def result() -> Array:
        found: Array = latest[0].float().cpu().numpy()
        return found

    def device_memory() -> int:
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(peak)

    version = f"torch {torch.__version__}"
    if device == "cpu":
        return Contender(forward, result, both, version)
    size = sum(leaf.nbytes for leaf in leaves)
    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    copies = [leaves]
    copies += [[x.clone() for x in leaves] for _ in range(copies_needed(size, cache) - 1)]
    return Contender(
        forward,
        result,
        both,
        version,
        device_memory,
        Replay(once, copies).milliseconds,
        Replay(once_both, copies).milliseconds,
    )


def onnx_model(problem: AttentionInputs, lowering: Lowering) -> bytes:
    """A model of this one node, its function inlined, for runtimes that know no functions."""
    import onnx
    from onnx import helper, inliner

    float32 = onnx.TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info(name, float32, array.shape)
        for name, array in (
            ("value", problem.value),
            ("locations", problem.locations),
            ("weights", problem.weights),
        )
    ]
    output = helper.make_tensor_value_info("out", float32, problem.grad_out.shape)
    node = make_node("value", "locations", "weights", "out", problem.shapes)
    graph = helper.make_graph([node], "attention", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    heads, channels = problem.value.shape[2:]
    set_lowering(model, HeadShape(heads, channels, problem.locations.shape[4]), lowering)
    inlined: bytes = inliner.inline_local_functions(model).SerializeToString()
    return inlined


def _feeds(problem: AttentionInputs) -> dict[str, Array]:
    if problem.dtype != "float32":
        raise Unavailable("takes part in float32 only")
    return {
        "value": problem.value,
        "locations": problem.locations,
        "weights": problem.weights,
    }


def onnxruntime(problem: AttentionInputs, lowering: Lowering) -> Contender:
    """ONNX Runtime on the CPU with one of the node's two bodies.

    Raises:
        Unavailable: Half precision.
    """
    import onnxruntime as ort

    feeds = _feeds(problem)
    options = ort.SessionOptions()
    options.intra_op_num_threads = problem.threads
    session = ort.InferenceSession(
        onnx_model(problem, lowering), options, providers=["CPUExecutionProvider"]
    )
    latest: list[Array] = []

    def forward() -> None:
        latest[:] = session.run(None, feeds)

    return Contender(forward, lambda: latest[0], None, f"onnxruntime {ort.__version__}")


def openvino(problem: AttentionInputs) -> Contender:
    """OpenVINO on the CPU with the GridSample body, in full precision.

    Raises:
        Unavailable: Not installed, or half precision.
    """
    try:
        import openvino as ov
    except ImportError as reason:
        raise Unavailable("not installed: pip install 'detr-distillery[openvino]'") from reason
    feeds = _feeds(problem)
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": problem.threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(
        core.read_model(onnx_model(problem, "gridsample")), "CPU", settings
    )
    request = compiled.create_infer_request()

    def forward() -> None:
        request.infer(feeds, share_inputs=True)

    def result() -> Array:
        found: Array = np.array(request.get_output_tensor(0).data)
        return found

    return Contender(forward, result, None, f"openvino {ov.__version__}")


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the GPU."""
    import torch

    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    target.copy_(source)
    events[0].record()
    for _ in range(10):
        target.copy_(source)
    events[1].record()
    torch.cuda.synchronize()
    seconds = float(events[0].elapsed_time(events[1])) / 1e3
    return 10 * 2 * source.nbytes / seconds


def check_device(device: str) -> None:
    """Checks that contenders can run on ``cpu`` or ``cuda``.

    Raises:
        UserError: ``device-missing``.
    """
    if device == "cpu":
        return
    try:
        import torch
    except ImportError as reason:
        raise UserError(
            "device-missing", "--device cuda needs torch: pip install 'detr-distillery[train]'"
        ) from reason
    if not torch.cuda.is_available():
        raise UserError("device-missing", "--device cuda: torch finds no CUDA device here")


def _return_freed_memory() -> None:
    """Makes the allocator give freed memory back, which new work would otherwise reuse unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


class PeakMemory:
    """Peak extra memory of a piece of work, from Linux's own high-water mark.

    ``bytes`` is ``None`` where the mark cannot be read or reset.
    """

    _status = Path("/proc/self/status")
    _reset = Path("/proc/self/clear_refs")

    def __enter__(self) -> PeakMemory:
        self.bytes: int | None = None
        self._before: int | None = None
        with contextlib.suppress(OSError):
            _return_freed_memory()
            self._reset.write_text("5")  # sets the high-water mark to what is used now
            self._before = self._read("VmHWM")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.bytes = self._read("VmHWM") - self._before

    def _read(self, field: str) -> int:
        line = next(x for x in self._status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024
