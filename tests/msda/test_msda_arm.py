"""The CPU kernels on Arm: compiled by a cross compiler with NEON and run under emulation.

Debian's packages g++-aarch64-linux-gnu and qemu-user; on an Arm machine, its own compiler.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from detr.msda import fallback
from detr.msda.check import check_sizes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "detr" / "msda" / "cpu"
NATIVE = platform.machine() in ("aarch64", "arm64")
COMPILER = "g++" if NATIVE else "aarch64-linux-gnu-g++"
DISASSEMBLER = "objdump" if NATIVE else "aarch64-linux-gnu-objdump"
EMULATOR: list[str] = [] if NATIVE else ["qemu-aarch64"]

pytestmark = pytest.mark.skipif(
    any(shutil.which(program) is None for program in [COMPILER, DISASSEMBLER, *EMULATOR]),
    reason=f"needs {COMPILER} and {' '.join(EMULATOR) or 'objdump'}",
)

SHAPES = ((7, 9), (3, 4), (1, 1))
TYPES = ("float32", "float64", "float16", "bfloat16")  # in the order of ValueType

Array = np.ndarray[Any, np.dtype[Any]]


def compile_for_arm(source: Path, target: Path, *options: str) -> None:
    """As CMakeLists.txt does, but for the processor."""
    command = [COMPILER, "-std=gnu++17", "-O3", "-fno-math-errno", "-fno-trapping-math"]
    subprocess.run([*command, *options, "-c", str(source), "-o", str(target)], check=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    compile_for_arm(KERNELS / "kernels.cpp", folder / "neon.o", "-DMSDA_TARGET=baseline")
    scalar = ["-DMSDA_TARGET=scalar", "-DMSDA_VECTOR_BYTES=4", "-fno-tree-vectorize"]
    compile_for_arm(
        KERNELS / "kernels.cpp", folder / "scalar.o", *scalar, "-fno-tree-slp-vectorize"
    )
    compile_for_arm(KERNELS / "pool.cpp", folder / "pool.o", "-pthread")
    compile_for_arm(HERE / "arm_kernels.cpp", folder / "main.o", f"-I{KERNELS}")
    objects = [str(folder / f"{name}.o") for name in ("neon", "scalar", "pool", "main")]
    subprocess.run(
        [COMPILER, "-static", "-pthread", *objects, "-o", str(folder / "kernels")], check=True
    )
    return folder / "kernels"


@dataclass
class Results:
    """What one build wrote, by the two ways of the forward pass."""

    out: Array
    value: Array
    locations: Array
    weights: Array


def run(program: Path, dtype: str, arrays: list[Array]) -> list[Results]:
    value, locations, weights, grad_out = arrays
    sizes = [TYPES.index(dtype), *value.shape, *weights.shape[1:2], len(SHAPES), weights.shape[4]]
    sizes += [size for shape in SHAPES for size in shape]
    problem, answer = program.with_name("problem"), program.with_name("answer")
    problem.write_bytes(
        np.array(sizes, np.int32).tobytes() + b"".join(array.tobytes() for array in arrays)
    )
    subprocess.run([*EMULATOR, str(program), str(problem), str(answer)], check=True, timeout=120)
    data, at, results = answer.read_bytes(), 0, []
    for _ in range(4):
        parts = []
        for like in (grad_out, value, locations, weights):
            parts.append(np.frombuffer(data, like.dtype, like.size, at).reshape(like.shape))
            at += like.nbytes
        results.append(Results(*parts))
    assert at == len(data)
    return results


@pytest.mark.parametrize("channels", [36, 7])
@pytest.mark.parametrize("dtype", TYPES)
def test_neon_gives_the_bits_of_the_scalar_path(program: Path, dtype: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    coordinates = np.float64 if dtype == "float64" else np.float32
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    batch, queries, heads, points = 2, 11, 3, 4
    tokens = sum(h * w for h, w in SHAPES)
    at = (batch, queries, heads, len(SHAPES), points)
    locations = (rng.random((*at, 2)) * 1.6 - 0.3).astype(coordinates)
    locations[0, 0, 0, 0, 0] = np.nan, 1e30
    arrays: list[Array] = [
        rng.standard_normal((batch, tokens, heads, channels)).astype(stored),
        locations,
        rng.random(at).astype(coordinates),
        rng.standard_normal((batch, queries, heads * channels)).astype(stored),
    ]
    neon, neon_packed, scalar, scalar_packed = run(program, dtype, arrays)
    for ours, theirs in ((neon, scalar), (neon_packed, scalar_packed), (neon, neon_packed)):
        assert ours.out.tobytes() == theirs.out.tobytes()
        assert ours.value.tobytes() == theirs.value.tobytes()

    wide = [array.astype(np.float64) for array in arrays]
    sizes = check_sizes(wide[0], SHAPES, wide[1], wide[2])
    step = {"float64": 1e-12, "float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    wanted = fallback.forward(sizes, *wide[:3]).reshape(sizes.out)
    np.testing.assert_allclose(neon.out.astype(np.float64), wanted, rtol=step, atol=2 * step)
    expected = fallback.backward(sizes, wide[3], *wide[:3])
    slack = 1e-12 if dtype == "float64" else 1e-5
    # Scalar products of whole heads: vectors add their channels up in another order.
    for found in (neon, scalar):
        grads = (found.value, found.locations, found.weights)
        for grad, exact, rtol in zip(grads, expected, (step, 0.0, 0.0), strict=True):
            atol = slack * float(np.abs(exact).max())
            np.testing.assert_allclose(grad.astype(np.float64), exact, rtol=rtol, atol=atol)


def test_one_build_has_vectors_and_the_other_none(program: Path) -> None:
    """The check itself: two scalar builds would agree, too."""

    def vector_products(name: str) -> int:
        command = [DISASSEMBLER, "-d", str(program.with_name(name))]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return sum("fmla" in line and ".4s" in line for line in text.splitlines())

    assert vector_products("neon.o") > 100 and vector_products("scalar.o") == 0


def test_the_modules_compile_for_arm(tmp_path: Path) -> None:
    """What Python imports: nanobind's part of the kernels and the solver of assignment problems."""
    nanobind = pytest.importorskip("nanobind")
    include = [f"-I{nanobind.include_dir()}", f"-I{sysconfig.get_paths()['include']}"]
    for source in (KERNELS / "module.cpp", ROOT / "distill/losses/native/assignment.cpp"):
        compile_for_arm(source, tmp_path / "module.o", *include, "-fopenmp-simd", "-fPIC")
