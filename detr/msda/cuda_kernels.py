"""Compiles the CUDA kernels with NVRTC and launches them; needs no torch and no CUDA toolkit.

Takes device pointers, so that torch tensors and TensorRT buffers are served alike; compiling to PTX
works on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from detr.errors import UserError
from detr.msda import cuda_source
from detr.msda.cuda_source import Attention

# Images x queries x heads, which the kernels count in 32 bits; a block's own come on top.
_MOST_GROUPS = 2**31 - 1024


@cache
def _bindings() -> tuple[ModuleType, ModuleType]:
    """The driver and NVRTC bindings."""
    try:
        from cuda.bindings import driver, nvrtc

        nvrtc.nvrtcVersion()  # finds out whether the library itself is there
    except (ImportError, RuntimeError) as reason:
        raise UserError(
            "cuda-bindings-missing",
            "the CUDA kernel needs cuda-bindings and NVRTC: pip install 'detr-distillery[gpu]', or "
            "with CUDA 12 cuda-bindings 12 and nvidia-cuda-nvrtc-cu12 "
            f"({' '.join(str(reason).split())})",
        ) from reason
    return driver, nvrtc


def require() -> None:
    """Does nothing where kernels can be compiled.

    Raises:
        UserError: ``cuda-bindings-missing``.
    """
    _bindings()


def _values(result: tuple[Any, ...]) -> list[Any]:
    """The values of a binding's (error, value...) tuple.

    Raises:
        RuntimeError: The call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__} {error.name}")
    return values


def _checked(result: tuple[Any, ...]) -> Any:
    """The one value of such a tuple, or nothing where there is none."""
    values = _values(result)
    return values[0] if values else None


def _compile_text(source: str, architecture: str, kind: str) -> bytes:
    """Compiles to ``PTX`` or ``CUBIN``.

    Raises:
        UserError: ``cuda-bindings-missing``.
        RuntimeError: The compiler refused the source (a defect of ours) or the architecture.
    """
    _, nvrtc = _bindings()
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            b"msda.cu",
            1,
            [cuda_source.header_text().encode()],
            [cuda_source.HEADER.name.encode()],
        )
    )
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(error) != 0:
            log = bytes(int(_checked(nvrtc.nvrtcGetProgramLogSize(program))))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC, {architecture}: {error.name}\n{log.decode()}")
        size = int(_checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
        code = bytes(size)
        _checked(getattr(nvrtc, f"nvrtcGet{kind}")(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@cache
def compile_ptx(attention: Attention, architecture: str) -> bytes:
    """PTX of both kernels, ended by a zero byte, for a virtual architecture (``compute_80``).

    Raises:
        UserError: ``cuda-bindings-missing``.
    """
    return _compile_text(attention.source, architecture, "PTX")


@dataclass(frozen=True)
class _Loaded:
    """The two kernels in the driver, and the geometry of their launches."""

    forward: Any
    backward: Any
    threads: int
    groups_per_block: int


@cache
def _capability(device: int) -> tuple[int, int]:
    driver, _ = _bindings()
    handle = _checked(driver.cuDeviceGet(device))
    attributes = driver.CUdevice_attribute
    major, minor = (
        int(_checked(driver.cuDeviceGetAttribute(attribute, handle)))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return major, minor


@cache
def _primary_context(device: int) -> Any:
    """The context the runtime, and with it torch, uses on a device."""
    driver, _ = _bindings()
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@contextlib.contextmanager
def _current(device: int) -> Iterator[None]:
    """Makes a device's context that of this thread, where it has none or another, for a while.

    A thread that has not called the CUDA runtime yet has none, whatever device torch says is its.
    """
    driver, _ = _bindings()
    context = _primary_context(device)
    before = _checked(driver.cuCtxGetCurrent())
    if int(before) == int(context):
        yield
        return
    _checked(driver.cuCtxPushCurrent(context))
    try:
        yield
    finally:
        _checked(driver.cuCtxPopCurrent())


def _code(attention: Attention, capability: tuple[int, int]) -> bytes:
    """Both kernels for a GPU: its machine code, or PTX where the GPU is newer than the compiler.

    Raises:
        UserError: ``compute-capability`` where the compiler has dropped the GPU.
    """
    _, nvrtc = _bindings()
    wanted = 10 * capability[0] + capability[1]
    known = sorted(int(number) for number in _checked(nvrtc.nvrtcGetSupportedArchs()))
    if wanted in known:
        return _compile_text(attention.source, f"sm_{wanted}", "CUBIN")
    older = [number for number in known if number < wanted]
    if not older:
        version = ".".join(map(str, _values(nvrtc.nvrtcVersion())))
        raise UserError(
            "compute-capability",
            f"this GPU has compute capability {wanted}, NVRTC {version} compiles for {known[0]} "
            "and newer; install the NVRTC of an older CUDA",
        )
    # The driver compiles PTX of an older architecture for any newer GPU.
    return compile_ptx(attention, f"compute_{older[-1]}")


@cache
def _load(attention: Attention, capability: tuple[int, int]) -> _Loaded:
    driver, _ = _bindings()
    code = np.frombuffer(_code(attention, capability), np.uint8)
    # A library, unlike a module, serves every device and context of its kind.
    library = _checked(driver.cuLibraryLoadData(code.ctypes.data, [], [], 0, [], [], 0))
    kernels = [
        _checked(driver.cuLibraryGetKernel(library, name.encode()))
        for name in (cuda_source.FORWARD, cuda_source.BACKWARD)
    ]
    forward, backward = (driver.CUfunction(int(kernel)) for kernel in kernels)
    return _Loaded(forward, backward, attention.threads, attention.groups_per_block)


def _arguments(
    inputs: Sequence[int],
    queries: int,
    groups: int,
    outputs: Sequence[int],
    shapes: Sequence[tuple[int, int]] | None,
) -> list[Any]:
    """A kernel's arguments in its order: inputs, scalars, outputs and, if not fixed, levels."""
    arguments: list[Any] = [ctypes.c_void_p(pointer) for pointer in inputs]
    arguments += [ctypes.c_int(queries), ctypes.c_int(groups)]
    arguments += [ctypes.c_void_p(pointer) for pointer in outputs]
    if shapes is not None:
        sizes = [size for shape in shapes for size in shape]
        arguments.append((ctypes.c_int * len(sizes))(*sizes))
    return arguments


def _launch(
    attention: Attention,
    device: int,
    stream: int,
    kernel: str,
    arguments: list[Any],
    groups: int,
) -> None:
    driver, _ = _bindings()
    if groups > _MOST_GROUPS:
        raise ValueError(
            f"{groups} images x queries x heads: the kernel counts at most {_MOST_GROUPS} of them"
        )
    pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
    with _current(device):
        loaded = _load(attention, _capability(device))
        grid = -(-groups // loaded.groups_per_block)
        _checked(
            driver.cuLaunchKernel(
                getattr(loaded, kernel), grid, 1, 1, loaded.threads, 1, 1, 0, stream,
                ctypes.addressof(pointers), 0,
            )
        )  # fmt: skip


def forward(
    attention: Attention,
    device: int,
    stream: int,
    sizes: tuple[int, int],
    inputs: Sequence[int],
    out: int,
    shapes: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Launches the forward kernel.

    Args:
        attention: What to run.
        device: Number of the device, as torch and the runtime count them.
        stream: Handle of the stream to launch on.
        sizes: Batch and number of queries.
        inputs: Device pointers of value, locations and weights: dense, on 16 bytes.
        out: Device pointer of the output.
        shapes: (height, width) of each level where ``attention`` does not fix them.

    Raises:
        UserError: ``cuda-bindings-missing``.
        ValueError: More than 2^31 of images x queries x heads.
        RuntimeError: The driver refused.
    """
    batch, queries = sizes
    groups = batch * queries * attention.heads
    if groups:
        arguments = _arguments(inputs, queries, groups, [out], shapes)
        _launch(attention, device, stream, "forward", arguments, groups)


def backward(
    attention: Attention,
    device: int,
    stream: int,
    sizes: tuple[int, int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    shapes: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Launches the backward kernel; arguments and errors as :func:`forward`, except for these.

    Args:
        attention: What to run.
        device: As in :func:`forward`.
        stream: As in :func:`forward`.
        sizes: As in :func:`forward`.
        inputs: Device pointers of grad_out, value, locations and weights.
        outputs: Device pointers of the gradients of value (zeros to begin with, float32 unless the
            value is float64), locations and weights.
        shapes: As in :func:`forward`.
    """
    batch, queries = sizes
    groups = batch * queries * attention.heads
    if groups:
        arguments = _arguments(inputs, queries, groups, outputs, shapes)
        _launch(attention, device, stream, "backward", arguments, groups)
