"""The TensorRT plugin's own PTX, launched as TensorRT launches it, without TensorRT.

Proves that the driver takes the version of PTX the text names, and that grid, block and the order
of arguments (inputs, the two scalars, output) give the right answer.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from detr.msda import fallback
from detr.msda.check import check_sizes
from detr.msda.cuda_source import FORWARD
from engines.msda_plugin import attention_of, plugin_ptx
from tools.gpu_check.driver import Driver
from tools.gpu_check.part import Cases, Parts, Setting, Skipped

SMALL = ((7, 9), (3, 4), (1, 1))
KITTI = ((51, 167), (26, 84), (13, 42), (7, 21))
HEADS, CHANNELS, POINTS = 8, 32, 4
# Rounding to the type, relative to the largest output.
_ALLOWED = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
_BATCHES = (1, 3)


def plugin(setting: Setting) -> Parts:
    """Each type of values, on small maps and on an attention of KITTI's decoder."""
    return {
        f"{name} {dtype}": partial(launched, setting, dtype, shapes, queries)
        for name, shapes, queries in (("small", SMALL, 5), ("kitti-decoder", KITTI, 900))
        for dtype in _ALLOWED
    }


def launched(
    setting: Setting, dtype: str, shapes: tuple[tuple[int, int], ...], queries: int
) -> dict[str, Any]:
    """Compiles once and launches for several batch sizes, as for a dynamic batch."""
    if setting.device == "cpu":
        raise Skipped("needs a driver")
    driver, cases = Driver(), Cases()
    flat = [size for shape in shapes for size in shape]
    tokens = sum(height * width for height, width in shapes)
    weights = (-1, queries, HEADS, len(shapes), POINTS)
    attention = attention_of(dtype, (-1, tokens, HEADS, CHANNELS), weights, flat)
    ptx = plugin_ptx(attention)
    kernel = driver.kernel(ptx.code, FORWARD)
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)

    def of_batch(batch: int) -> dict[str, float]:
        rng = np.random.default_rng(batch)
        value = rng.standard_normal((batch, tokens, HEADS, CHANNELS)).astype(stored)
        at = (batch, *weights[1:])
        locations = (rng.random((*at, 2)) * 1.6 - 0.3).astype(np.float32)
        shares = rng.random(at).astype(np.float32)
        sizes = check_sizes(value, shapes, locations, shares)
        groups = batch * queries * HEADS
        out = np.empty(sizes.out, stored)
        room = driver.room(out)
        arguments: list[Any] = [
            ctypes.c_void_p(driver.upload(array)) for array in (value, locations, shares)
        ]
        arguments += [ctypes.c_int(queries), ctypes.c_int(groups), ctypes.c_void_p(room)]
        driver.launch(kernel, attention.blocks(groups), attention.threads, arguments)
        found = driver.download(room, out).astype(np.float64)
        wide = [array.astype(np.float64) for array in (value, locations, shares)]
        exact = fallback.forward(sizes, *wide).reshape(sizes.out)
        return {"error": float(np.abs(found - exact).max() / np.abs(exact).max())}

    for batch in _BATCHES:
        cases.run(f"batch {batch}", partial(of_batch, batch), _ALLOWED[dtype])
    return {"cases": cases.finish(), "ptx": ptx.versions}
