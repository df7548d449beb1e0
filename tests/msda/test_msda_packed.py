"""Many queries read a packed copy of a head's values, few read them in place: the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr.msda import _native

sys.path.insert(0, str(Path(__file__).parent))
from msda_cases import Array, Case, make_case

Shapes = tuple[tuple[int, int], ...]
SAMPLES = (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 20, 24, 27)
KINDS = ("float32", "float64", "float16", "bfloat16")


def cells(shapes: Shapes) -> int:
    """Packed cells of a head, borders of zeros included."""
    return sum((height + 2) * (width + 1) + 1 for height, width in shapes)


def typed(kind: str, case: Case) -> tuple[Array, Array, Array]:
    if kind == "bfloat16":  # numpy has none: its bits
        value = (case.value.view(np.uint32) >> 16).astype(np.uint16)
    else:
        value = case.value.astype(kind)
    coordinate = np.float64 if kind == "float64" else np.float32
    return value, case.locations.astype(coordinate), case.weights.astype(coordinate)


def both_ways(
    shapes: Shapes, value: Array, locations: Array, weights: Array, target: str = ""
) -> tuple[Array, Array]:
    """All queries in one call, and so few at a time that none packs."""
    batch, queries, heads, levels, points = weights.shape
    samples, enough = levels * points, 4 * cells(shapes)
    assert heads > 1 and samples < enough <= queries * samples
    out = np.empty((batch, queries, heads * value.shape[3]), value.dtype)
    _native.forward(value, shapes, locations, weights, out, 1, target)
    parts = []
    step = (enough - 1) // samples
    for query in range(0, queries, step):
        some = slice(query, query + step)
        dense = [np.ascontiguousarray(array[:, some]) for array in (locations, weights)]
        part = np.empty((batch, dense[0].shape[1], out.shape[2]), value.dtype)
        _native.forward(value, shapes, *dense, part, 1, target)
        parts.append(part)
    return out, np.concatenate(parts, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", _native.targets())
@pytest.mark.parametrize("shapes", [((1, 1),), ((1, 9),), ((9, 1),), ((5, 4),)])
def test_packed_and_in_place_give_the_same_bits(shapes: Shapes, target: str, kind: str) -> None:
    """Every number of samples has its own way through the vectors; every map here is all border."""
    for samples in SAMPLES:
        queries = 4 * cells(shapes) // samples + 37
        case = make_case(shapes, batch=2, channels=7, queries=queries, points=samples, seed=samples)
        case.locations[:, ::5, :, :, 0] = np.nan
        case.locations[:, 1::5, :, :, -1] = (0.0, 1.0)  # a corner of the map
        case.locations[:, 2::5, :, :, -1, 1] = 0.5 / shapes[0][0]  # on a texel's center
        packed, in_place = both_ways(shapes, *typed(kind, case), target)
        assert packed.tobytes() == in_place.tobytes(), samples
        if kind == "float32":
            np.testing.assert_allclose(packed, case.forward64(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("points", [4, 5, 100, 128])
def test_several_levels_and_up_to_512_samples(points: int) -> None:
    shapes = ((1, 1), (20, 21), (1, 9), (9, 1))
    case = make_case(shapes, channels=36, queries=2200 // points, points=points)
    packed, in_place = both_ways(shapes, case.value, case.locations, case.weights)
    assert packed.tobytes() == in_place.tobytes()
    np.testing.assert_allclose(packed, case.forward64(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("far", [-3.0, 3.0, np.nan, np.inf, -np.inf, 1e30, -1e9])
def test_what_lies_outside_never_meets_an_infinite_value(far: float) -> None:
    """A share of zero is not enough: zero times infinity is NaN."""
    shapes = ((1, 1), (2, 3))
    case = make_case(shapes, queries=60)
    case.value[...] = np.inf
    for axis in (0, 1):
        locations = case.locations.copy()
        locations[..., axis] = far
        for out in both_ways(shapes, case.value, locations, case.weights):
            assert (out == 0).all()


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from detr.msda import _native
page, libc, kept = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True), []
def guarded(array):
    # A copy that ends where the next page may not be touched.
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    at = size - array.nbytes
    copy = np.frombuffer(memory, array.dtype, array.size, at).reshape(array.shape)
    copy[...] = array
    kept.append(memory)
    return copy
shapes, tokens = ((2, 3), (1, 1)), 7
rng = np.random.default_rng(0)
for target in _native.targets():
    for points in (1, 2, 3, 4, 7, 9, 10, 17):
        for queries in (1, 400):
            weights = rng.random((1, queries, 2, 2, points), dtype=np.float32)
            locations = rng.random((*weights.shape, 2), dtype=np.float32)
            value = rng.random((1, tokens, 2, 5), dtype=np.float32)
            arrays = [guarded(x) for x in (value, locations, weights)]
            out = guarded(np.empty((1, queries, 10), np.float32))
            _native.forward(arrays[0], shapes, *arrays[1:], out, 1, target)
            assert np.isfinite(out).all()
print("done")
"""


@pytest.mark.slow
def test_nothing_past_the_end_of_an_array_is_touched() -> None:
    command: list[Any] = [sys.executable, "-c", GUARDED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", (run.returncode, run.stderr)
