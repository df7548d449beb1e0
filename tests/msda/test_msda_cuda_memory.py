"""The CUDA kernels at their launch geometry under AddressSanitizer, in three orders of threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from detr.msda import cuda_source, fallback
from detr.msda.check import check_sizes
from detr.msda.cuda_source import Attention

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="no C++ compiler"
)
HERE = Path(__file__).parent
SHAPES = ((7, 9), (3, 4), (1, 1), (5, 2))
BATCH, QUERIES, HEADS, POINTS = 2, 5, 3, 2

Array = np.ndarray[Any, np.dtype[Any]]


def compiled(kind: Attention, folder: Path) -> Path:
    source, program = folder / "attention.cu", folder / "program"
    source.write_text(kind.source)
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"]
    command += ["-Wno-unknown-pragmas", f"-I{cuda_source.HEADER.parent}", f"-I{HERE}"]
    command += [f'-DMSDA_KERNELS="{source}"', "-o", str(program)]
    subprocess.run([*command, str(HERE / "cuda_on_cpu_main.cpp")], check=True)
    return program


def stored(dtype: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def run(program: Path, arrays: list[Array], order: int) -> list[Array]:
    """What the kernels wrote, in an order of threads."""
    value, locations, weights, grad_out = arrays
    problem, answer = program.with_name("problem"), program.with_name("answer")
    sizes = [BATCH, QUERIES, value.shape[1], *(size for shape in SHAPES for size in shape)]
    problem.write_bytes(
        np.array(sizes, np.int32).tobytes() + b"".join(array.tobytes() for array in arrays)
    )
    done = subprocess.run([program, problem, answer, str(order)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data, results, at = answer.read_bytes(), [], 0
    kinds = [(grad_out.shape, grad_out.dtype)]
    kinds += [(x.shape, locations.dtype) for x in (value, locations, weights)]
    for shape, dtype in kinds:
        count = int(np.prod(shape))
        results.append(np.frombuffer(data, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize
    assert at == len(data)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "channels", "fixed"),
    [
        ("float32", 32, True),
        ("float16", 7, False),  # lanes without channels, one value at a time
        ("bfloat16", 256, False),  # a head as wide as a warp
        ("float64", 1, False),  # a head of one thread
    ],
)
def test_no_access_beside_an_array_and_no_race(
    dtype: str, channels: int, fixed: bool, tmp_path: Path
) -> None:
    """With levels fixed when compiled and, as in training, given at run time."""
    rng = np.random.default_rng(0)
    kind = Attention(dtype, HEADS, channels, len(SHAPES), POINTS, SHAPES if fixed else None)
    coordinates = np.float64 if dtype == "float64" else np.float32
    tokens = sum(h * w for h, w in SHAPES)
    at = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    locations = (rng.random((*at, 2)) * 1.6 - 0.3).astype(coordinates)
    locations[0, 0, 0, 0, 0] = np.nan, 1e30
    locations[1, 4, 2, 3, 1] = -np.inf, np.inf
    locations[0, 1, 1] = 1.0  # the last corner of every level, and of the last the end of the array
    arrays: list[Array] = [
        rng.standard_normal((BATCH, tokens, HEADS, channels)).astype(stored(dtype)),
        locations,
        rng.random(at).astype(coordinates),
        rng.standard_normal((BATCH, QUERIES, HEADS * channels)).astype(stored(dtype)),
    ]
    program = compiled(kind, tmp_path)
    first = run(program, arrays, 0)
    for order in (1, 2):
        # Sums of a head's lanes and of a query's samples have their order; only gradients of
        # values are added up as threads come.
        for name, one, other in zip(
            ("out", "value", "locations", "weights"),
            first,
            run(program, arrays, order),
            strict=True,
        ):
            if name == "value":
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
            else:
                assert one.tobytes() == other.tobytes(), f"{name} depends on the order of threads"

    wide = [array.astype(np.float64) for array in arrays]
    sizes = check_sizes(wide[0], SHAPES, wide[1], wide[2])
    wanted = fallback.forward(sizes, *wide[:3]).reshape(sizes.out)
    step = {"float64": 1e-12, "float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(first[0].astype(np.float64), wanted, rtol=step, atol=2 * step)
    expected = fallback.backward(sizes, wide[3], *wide[:3])
    for grad, exact in zip(first[1:], expected, strict=True):
        slack = (1e-12 if dtype == "float64" else 1e-5) * float(np.abs(exact).max())
        np.testing.assert_allclose(grad, exact, rtol=0, atol=slack)


def test_an_access_beside_an_array_would_be_seen(tmp_path: Path) -> None:
    """The check itself: a kernel told of a level one row higher reads past the values' end."""
    kind = Attention("float32", HEADS, 32, len(SHAPES), POINTS, SHAPES)
    higher = Attention("float32", HEADS, 32, len(SHAPES), POINTS, (*SHAPES[:-1], (6, 2)))
    tokens = sum(h * w for h, w in SHAPES)
    at = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    arrays: list[Array] = [
        np.ones((BATCH, tokens, HEADS, 32), np.float32),
        np.full((*at, 2), 0.99, np.float32),
        np.ones(at, np.float32),
        np.ones((BATCH, QUERIES, HEADS * 32), np.float32),
    ]
    assert kind.source != higher.source
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run(compiled(higher, tmp_path), arrays, 0)
