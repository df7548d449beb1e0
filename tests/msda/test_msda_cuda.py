"""The CUDA kernels without a GPU: they compile for every architecture, and the same code, compiled
for the CPU, matches the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from detr.msda import cuda_source, fallback
from detr.msda.check import check_sizes
from detr.msda.cuda_source import Attention
from detr.points import Points, sample_axes, unequal

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
SHAPES = ((7, 9), (3, 4), (1, 1))
HERE = Path(__file__).parent

Array = np.ndarray[Any, np.dtype[Any]]


def attention(
    dtype: str = "float16", channels: int = 32, fixed: bool = True, points: Points = 3
) -> Attention:
    return Attention(dtype, 2, channels, len(SHAPES), points, SHAPES if fixed else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("msda_cuda")


class OnCpu:
    """One attention's CUDA kernels, compiled for this machine."""

    def __init__(self, kind: Attention, folder: Path) -> None:
        self.kind = kind
        name = f"{kind.dtype}_{kind.channels}_{kind.samples}"
        (folder / f"{name}.cu").write_text(kind.source)
        library = folder / f"{name}.so"
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        command += [f"-I{cuda_source.HEADER.parent}", f"-I{HERE}"]
        command += [f'-DMSDA_KERNELS="{folder / name}.cu"', "-o", str(library)]
        subprocess.run([*command, str(HERE / "cuda_on_cpu.cpp")], check=True)
        self.library = ctypes.CDLL(str(library))

    def __call__(self, kernel: str, arrays: list[Array], outputs: list[Array]) -> None:
        batch, queries, heads = arrays[-1].shape[:3]
        groups = batch * queries * heads
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, *outputs)]
        pointers[len(arrays) : len(arrays)] = [queries, groups]
        getattr(self.library, kernel)(*pointers, self.kind.blocks(groups))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "channels", "points"),
    [
        ("float32", 32, 3),
        ("float16", 32, 3),
        ("bfloat16", 16, 3),
        ("float64", 4, 3),
        ("float32", 12, 3),
        ("float16", 7, 3),
        ("float32", 32, (3, 6, 2)),
        ("float16", 8, (1, 1, 5)),
    ],
)
def test_the_device_code_matches_the_reference(
    dtype: str, channels: int, points: Points, folder: Path
) -> None:
    rng = np.random.default_rng(0)
    kind = attention(dtype, channels, points=points)
    coordinates = np.float64 if dtype == "float64" else np.float32
    bf16 = dtype == "bfloat16"
    stored = ml_dtypes.bfloat16 if bf16 else np.dtype(dtype)
    tokens = sum(h * w for h, w in SHAPES)
    value = rng.standard_normal((2, tokens, 2, channels)).astype(stored)
    at = (2, 11, 2, *sample_axes(points, len(SHAPES)))
    locations = (rng.random((*at, 2)) * 1.4 - 0.2).astype(coordinates)
    locations[0, 3, 0].reshape(-1, 2)[0, 0] = np.nan
    weights = rng.random(at).astype(coordinates)
    grad_out = rng.standard_normal((2, 11, 2 * channels)).astype(stored)

    kernels = OnCpu(kind, folder)
    out = np.full_like(grad_out, 99)
    kernels("run_forward", [value, locations, weights], [out])
    wide = [array.astype(np.float64) for array in (value, locations, weights)]
    sizes = check_sizes(wide[0], SHAPES, wide[1], wide[2], unequal(points))
    step = {"float64": 1e-12, "float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    wanted = fallback.forward(sizes, *wide).reshape(sizes.out)
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=step, atol=2 * step)

    grads = [
        np.zeros(value.shape, coordinates),
        np.full_like(locations, 99),
        np.full_like(weights, 99),
    ]
    kernels("run_backward", [grad_out, value, locations, weights], grads)
    expected = fallback.backward(sizes, grad_out.astype(np.float64), *wide)
    slack = 1e-12 if dtype == "float64" else 1e-5
    for name, grad, exact in zip(("value", "locations", "weights"), grads, expected, strict=True):
        scale = float(np.abs(exact).max())
        np.testing.assert_allclose(grad, exact, rtol=0, atol=slack * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_compiles_for_every_architecture(folder: Path) -> None:
    source = folder / "attention.cu"
    source.write_text(attention().source)
    command = ["nvcc", "-std=c++17", "-fatbin", "-Werror=all-warnings", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    command += [f"-I{cuda_source.HEADER.parent}", "-o", str(folder / "attention.fatbin")]
    done = subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    assert (folder / "attention.fatbin").stat().st_size > 10_000
    # What does not fit in registers would be read from memory again, in the innermost loop.
    told = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert told == [("0", "0")] * (2 * len(ARCHITECTURES))


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_nvrtc_compiles_without_a_gpu(dtype: str, fixed: bool) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from detr.msda.cuda_kernels import compile_ptx

    kind = attention(dtype, fixed=fixed)
    ptx = compile_ptx(kind, "compute_80").decode()
    for kernel in ("msda_forward", "msda_backward"):
        assert f".entry {kernel}(" in ptx
    # The corners' channels are read 16 bytes at a time, and nothing spills to local memory.
    wide = "ld.global.nc.v2.f64" if dtype == "float64" else "ld.global.nc.v4."
    assert wide in ptx and ".local" not in ptx
    forward = ptx[ptx.index(".entry msda_forward") :]
    forward = forward[: forward.index("\n}")]
    parameters = forward[: forward.index(")")].count(".param")
    assert parameters == (6 if fixed else 7)
    # A location is read at once, and a sample comes out of shared memory 8 bytes at a time.
    assert f"ld.global.nc.v2.{'f64' if dtype == 'float64' else 'f32'}" in forward
    assert dtype == "float64" or ("ld.shared.v2." in forward and "ld.shared.f32" not in forward)


@pytest.mark.parametrize("architecture", ["compute_75", "compute_90", "compute_120"])
def test_nvrtc_compiles_for_old_and_new_architectures(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from detr.msda.cuda_kernels import compile_ptx

    ptx = compile_ptx(attention(), architecture).decode()
    # Gradients are added up four at a time where the GPU can.
    assert ("atom.global.add.v4.f32" in ptx) == (architecture != "compute_75")


@pytest.mark.parametrize(
    ("dtype", "channels", "lane", "lanes"),
    [
        ("float32", 32, 4, 8),
        ("float16", 32, 8, 4),
        ("float16", 36, 4, 16),
        ("float32", 256, 8, 32),
        ("float16", 7, 1, 8),
        ("float64", 1, 1, 1),
    ],
)
def test_threads_of_a_head(dtype: str, channels: int, lane: int, lanes: int) -> None:
    kind = Attention(dtype, 8, channels, 4, 4)
    assert (kind.lane_channels, kind.lanes) == (lane, lanes)
    assert kind.supported and kind.blocks(0) == 0
    assert kind.blocks(kind.groups_per_block + 1) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("samples", [(1, 4), (4, 4), (5, 4), (3, 3)])
def test_the_samples_of_a_warps_heads_lie_in_different_banks(
    dtype: str, samples: tuple[int, int]
) -> None:
    """32 banks of 4 bytes: half a warp reads 8 bytes per thread, those of a head the same ones."""
    kind = Attention(dtype, 8, 32, *samples)
    sample_bytes = 24  # sizeof(Staged)
    slots = kind._group_bytes // (sample_bytes + 12)
    assert slots >= samples[0] * samples[1]
    heads = 16 // kind.lanes
    banks = [(head * slots * sample_bytes // 4 + i) % 32 for head in range(heads) for i in (0, 1)]
    assert len(set(banks)) == len(banks)


def test_heads_wider_than_a_warp_are_left_to_grid_sample() -> None:
    assert not Attention("float32", 8, 37, 4, 4).supported
    assert not Attention("float32", 8, 32, 32, 64).supported
    assert not Attention("float32", 8, 32, 4, 0).supported  # C++ has no arrays of no elements
    assert Attention("float32", 8, 32, 4, 32).threads == 64  # the samples of 128 would not fit
