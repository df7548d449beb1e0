"""The kernel's speed: replays of a CUDA graph against ``grid_sample`` and the memory's bandwidth.

``bench op msda`` does the measuring, over copies of the inputs that are larger than the second
cache; ``bandwidth`` is the share of a large copy's.
"""

from __future__ import annotations

from functools import partial

from bench.op.msda import DTYPES, PRESETS, benchmark_msda
from detr.cores import usable_cores
from detr.errors import UserError
from tools.gpu_check.part import Cases, Device, Parts, Setting, Skipped

# On the CPU one of each is enough to have run the lines.
_BATCHES: dict[Device, tuple[int, ...]] = {"cuda": (1, 8), "cpu": (1,)}
_LEFT_OUT = ("dino-5scale",)  # grid_sample's samples alone take 6 GiB an image


def timing(setting: Setting) -> Parts:
    """Each published attention, every type and two batch sizes."""
    return {
        preset: partial(timed, setting.device, preset)
        for preset in PRESETS
        if preset not in _LEFT_OUT
    }


def timed(device: Device, preset: str) -> str:
    """Milliseconds of our kernel, how many times ``grid_sample`` takes, and bandwidth."""
    cases = Cases()
    for batch in _BATCHES[device]:
        for dtype in DTYPES:
            cases.run(f"x{batch} {dtype}", partial(_timed, device, preset, dtype, batch))
    return cases.finish()


def _timed(device: Device, preset: str, dtype: str, batch: int) -> dict[str, float]:
    try:
        report = benchmark_msda(preset, dtype, device, {"torch"}, batch, usable_cores())
    except UserError as error:
        if error.code == "device-missing":
            raise Skipped(error.message) from error
        raise
    (ours,) = [row for row in report.rows if row.name == "native as torch op"]
    figures = {
        "forward_ms": ours.forward_ms,
        "both_ms": ours.both_ms,
        "times_faster": ours.times_faster,
        "times_faster_both": ours.times_faster_both,
        "bandwidth": ours.bandwidth,
        "extra_mb": ours.extra_mb,
        "error": ours.error,
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
