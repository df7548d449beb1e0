"""Compiles the stand-in for the driver, and kernels that it runs on the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from detr.msda import cuda_source
from detr.msda.cuda_source import Attention

HERE = Path(__file__).resolve().parent


def compile_driver(folder: Path) -> Path:
    """A folder with ``libcuda.so.1``, for ``LD_LIBRARY_PATH``."""
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(HERE / "fake_libcuda.c"), "-ldl"], check=True)
    return folder


def compile_kernels(attention: Attention, folder: Path) -> Path:
    """One attention's kernels for ``FAKE_CUDA_KERNELS``."""
    source, library = folder / "attention.cu", folder / "attention.so"
    source.write_text(attention.source)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [f"-I{cuda_source.HEADER.parent}", f"-I{HERE}", f'-DMSDA_KERNELS="{source}"']
    subprocess.run([*command, "-o", str(library), str(HERE / "fake_kernels.cpp")], check=True)
    return library


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a process is started with to find the stand-in; its notes are in ``folder / "log"``."""
    (folder / "log").write_text("")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        "FAKE_CUDA_LOG": str(folder / "log"),
        **more,
    }
