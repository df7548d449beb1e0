"""How torch uses an ordinary processor: memory that stays with the process, layout of maps."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# mallopt(3): do not give freed memory back below this, and take nothing by mmap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare_cpu() -> None:
    """Makes training on the CPU faster; call it before the first large tensor.

    glibc maps every large tensor anew and returns it to the kernel, so each step pays a page fault
    per 4 KiB of activations. Keeping freed memory in the process, in huge pages, avoids them.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # Activations that decay to denormal numbers would slow every operation they meet.
    torch.set_flush_denormal(True)


def trained_format(device: torch.device) -> torch.memory_format:
    """The layout of weights and maps in which convolutions are trained fastest.

    Channels-last on a GPU, for its tensor cores, and on a CPU, where it is a third faster with
    AVX-512. With AVX2 oneDNN has no kernel for gradients of weights in it, and takes up to five
    times as long.
    """
    without = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if without else torch.channels_last
