"""``bench op msda``: one deformable attention, our kernel against the other ways to compute it.

All contenders run in one process, on the same inputs, with the same number of threads, and none is
timed before its output was checked against float64.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import click
import numpy as np

from bench.machine.clocks import Watch, read_clocks
from bench.machine.environment import assess_environment, read_machine
from bench.op import contenders
from bench.op.contenders import Array, AttentionInputs, Contender, PeakMemory, Unavailable
from bench.op.report import BASE, DeviceType, OpReport, OpRow
from detr.cli_support import Group, emit, json_option, progress
from detr.cores import usable_cores
from detr.errors import GateError
from detr.msda import fallback
from detr.msda.check import check_sizes

DTYPES = ("float32", "float16", "bfloat16")
HEADS, CHANNELS, POINTS = 8, 32, 4
NATIVE = ("native", "native as torch op")

# Queries whose output is checked: the float64 reference is far too slow for all of them.
_CHECKED = 200
# Largest error, relative to the largest output: other runtimes round coordinates to [-1, 1] first.
_TOLERANCE = {"float32": 2e-3, "float16": 4e-3, "bfloat16": 3e-2}
_OUR_TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
_ROUNDS, _BURST_CALLS, _BURST_SECONDS = 5, 20, 0.5


@dataclass(frozen=True)
class AttentionPreset:
    """Sizes of one published attention; ``queries`` is ``None`` for an encoder's own tokens."""

    shapes: tuple[tuple[int, int], ...]
    queries: int | None = None


# Canvases of 402 x 1333 (KITTI) and 800 x 1333 (COCO), strides 8 to 64; DINO 5-scale adds stride 4.
_KITTI = ((51, 167), (26, 84), (13, 42), (7, 21))
_COCO = ((100, 167), (50, 84), (25, 42), (13, 21))
PRESETS = {
    "kitti-encoder": AttentionPreset(_KITTI),
    "kitti-decoder": AttentionPreset(_KITTI, 900),
    "coco-encoder": AttentionPreset(_COCO),
    "dino-5scale": AttentionPreset(((200, 334), *_COCO)),
}


def make_inputs(preset: str, dtype: str, batch: int, threads: int) -> AttentionInputs:
    """Inputs with the locality of the real thing: samples lie a few cells around their query."""
    chosen = PRESETS[preset]
    rng = np.random.default_rng(0)
    sizes = np.array([(width, height) for height, width in chosen.shapes], np.float32)
    if chosen.queries is None:
        centers = [
            np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1)
            for h, w in chosen.shapes
        ]
        reference = np.concatenate([center.reshape(-1, 2) for center in centers])
    else:
        reference = rng.random((chosen.queries, 2))
    queries, levels = len(reference), len(chosen.shapes)
    tokens = sum(h * w for h, w in chosen.shapes)
    at = (batch, queries, HEADS, levels, POINTS)
    offsets = 2 * rng.standard_normal((*at, 2), dtype=np.float32) / sizes[:, None]
    weights = rng.random(at, dtype=np.float32)
    weights /= weights.sum((3, 4), keepdims=True)
    if dtype == "bfloat16":
        import ml_dtypes  # comes with onnx

        stored: Any = ml_dtypes.bfloat16
    else:
        stored = np.dtype(dtype)
    value = rng.standard_normal((batch, tokens, HEADS, CHANNELS), dtype=np.float32)
    grad_out = rng.standard_normal((batch, queries, HEADS * CHANNELS), dtype=np.float32)
    locations = reference.astype(np.float32)[None, :, None, None, None] + offsets
    return AttentionInputs(
        chosen.shapes,
        _aligned(value.astype(stored)),
        _aligned(locations),
        _aligned(weights),
        _aligned(grad_out.astype(stored)),
        threads,
    )


def _aligned(array: Array) -> Array:
    """A copy that starts on a cache line, as every runtime's own tensors do and numpy's do not."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy: Array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def reference_output(problem: AttentionInputs) -> tuple[Array, Array]:
    """Indices of the checked queries and their output in float64, ``[B, checked, M * D]``."""
    count = problem.locations.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, _CHECKED).astype(int))
    value = problem.value.astype(np.float64)
    locations = problem.locations[:, chosen].astype(np.float64)
    weights = problem.weights[:, chosen].astype(np.float64)
    sizes = check_sizes(value, problem.shapes, locations, weights)
    return chosen, fallback.forward(sizes, value, locations, weights).reshape(sizes.out)


def _burst(call: Callable[[], object], replay: Callable[[], float] | None) -> list[float]:
    """Times of a call in milliseconds, until there are enough or it took long enough.

    On a GPU the device's own time of replays from a CUDA graph; see :mod:`bench.op.replay`. On the
    CPU after one call that is not counted: it wakes the contender's own threads and puts those of
    the one before it to sleep.
    """
    times: list[float] = []
    if replay is None:
        call()
    while not times or (sum(times) < 1e3 * _BURST_SECONDS and len(times) < _BURST_CALLS):
        start = perf_counter()
        if replay is None:
            call()
            times.append(1e3 * (perf_counter() - start))
        else:
            times.append(replay())
    return times


@dataclass
class _Entrant:
    """A contender that gave the right answer, and its times."""

    contender: Contender
    row: OpRow
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def burst(self) -> None:
        self.forward += _burst(self.contender.forward, self.contender.replay)
        if self.contender.both is not None:
            self.both += _burst(self.contender.both, self.contender.replay_both)

    def finish(self) -> None:
        self.row.calls = len(self.forward)
        self.row.forward_ms = float(np.median(self.forward))
        self.row.forward_best_ms = min(self.forward)
        if self.both:
            self.row.both_ms = float(np.median(self.both))


def _enter(
    name: str, contender: Contender, problem: AttentionInputs, wanted: tuple[Array, Array]
) -> _Entrant:
    """Measures memory and error.

    Raises:
        GateError: ``kernel-mismatch``.
    """
    chosen, exact = wanted
    if contender.device_memory is not None:
        contender.forward()
        contender.device_memory()
    gc.collect()
    with PeakMemory() as memory:
        contender.forward()
    extra = memory.bytes if contender.device_memory is None else contender.device_memory()
    error = float(np.abs(contender.result()[:, chosen].astype(np.float64) - exact).max(initial=0))
    scale = max(1.0, float(np.abs(exact).max(initial=0)))
    allowed = (_OUR_TOLERANCE if name in NATIVE else _TOLERANCE)[problem.dtype]
    if not error <= allowed * scale:
        raise GateError(
            "kernel-mismatch",
            f"{name}: output is off by {error:.2e} from float64, more than {allowed * scale:.1e}",
        )
    row = OpRow(
        name=name,
        version=contender.version,
        extra_mb=extra / 2**20 if extra is not None else None,
        error=error,
    )
    return _Entrant(contender, row)


def _builders(problem: AttentionInputs, device: DeviceType) -> dict[str, Callable[[], Contender]]:
    torch_ways = {
        "native as torch op": lambda: contenders.torch_op(problem, device),
        BASE: lambda: contenders.torch_grid_sample(problem, device),
    }
    if device == "cuda":
        return torch_ways
    return {
        "native": lambda: contenders.native(problem),
        **torch_ways,
        "onnxruntime GridSample": lambda: contenders.onnxruntime(problem, "gridsample"),
        "onnxruntime gather": lambda: contenders.onnxruntime(problem, "gather"),
        "openvino GridSample": lambda: contenders.openvino(problem),
    }


CONTENDERS = {
    "torch": BASE,
    "onnxruntime": "onnxruntime GridSample",
    "gather": "onnxruntime gather",
    "openvino": "openvino GridSample",
}


def benchmark_msda(
    preset: str, dtype: str, device: DeviceType, against: set[str], batch: int, threads: int
) -> OpReport:
    """Checks and times our kernel and each contender of ``against`` (keys of ``CONTENDERS``).

    Raises:
        UserError: ``device-missing``.
        GateError: ``kernel-mismatch``: a contender's output is wrong.
    """
    contenders.check_device(device)
    problem = make_inputs(preset, dtype, batch, threads)
    wanted = reference_output(problem)
    before = read_clocks()
    rows = []
    names = {*NATIVE, *(CONTENDERS[name] for name in against)}
    builders = {k: v for k, v in _builders(problem, device).items() if k in names}
    entrants = []
    for name, build in progress(list(builders.items()), "checking outputs"):
        try:
            entrants.append(_enter(name, build(), problem, wanted))
            rows.append(entrants[-1].row)
        except ModuleNotFoundError as reason:
            rows.append(OpRow(name=name, skipped=f"{reason.name} is not installed"))
        except Unavailable as reason:
            rows.append(OpRow(name=name, skipped=str(reason)))
    # In turn, so that whatever else the machine does meets all of them alike.
    watch = Watch()
    for _ in progress(range(_ROUNDS), "timing"):
        for entrant in entrants:
            entrant.burst()
        watch()
    after = read_clocks()
    for entrant in entrants:
        entrant.finish()
    _compare(rows)
    if device == "cuda":
        touched = sum(
            x.nbytes for x in (problem.value, problem.locations, problem.weights, problem.grad_out)
        )
        peak = contenders.copy_bandwidth()
        for row in rows:
            if row.forward_ms is not None:
                row.bandwidth = touched / (row.forward_ms / 1e3) / peak
    versions = dict(row.version.split(maxsplit=1) for row in rows if row.version)
    versions["native kernel"] = versions.pop("detr", "numpy")
    environment = assess_environment(
        read_machine(versions), before, after, watch.drift(), on_accelerator=device == "cuda"
    )
    return OpReport(
        preset=preset,
        dtype=dtype,
        device=device,
        threads=threads,
        batch=batch,
        queries=problem.locations.shape[1],
        heads=HEADS,
        channels=CHANNELS,
        points=POINTS,
        levels=list(problem.shapes),
        output_mb=problem.grad_out.nbytes / 2**20,
        rows=rows,
        environment=environment,
    )


def _compare(rows: list[OpRow]) -> None:
    base = next((row for row in rows if row.name == BASE), None)
    if base is None or base.forward_ms is None:
        return
    for row in rows:
        if row.forward_ms is not None:
            row.times_faster = base.forward_ms / row.forward_ms
        if row.both_ms is not None and base.both_ms is not None:
            row.times_faster_both = base.both_ms / row.both_ms


@click.group(cls=Group)
def op() -> None:
    """Time single operators."""


@op.command()
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="kitti-encoder",
    show_default=True,
    help="Shapes of a published detector's attention.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Type of the values; locations, weights and sums are float32.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where all contenders run.",
)
@click.option(
    "--against",
    type=click.Choice(["all", *CONTENDERS]),
    multiple=True,
    default=["all"],
    show_default=True,
    help="What to compare with; may be repeated.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images at once."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="For every contender; all cores by default."
)
@json_option
def msda(
    preset: str,
    dtype: str,
    device: DeviceType,
    against: tuple[str, ...],
    batch: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time multi-scale deformable attention.

    Example: detr bench op msda --preset kitti-encoder --against all
    """
    chosen = set(CONTENDERS) if "all" in against else set(against)
    report = benchmark_msda(preset, dtype, device, chosen, batch, threads or usable_cores())
    emit(report, as_json, report.text())
