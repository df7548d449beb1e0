"""The torch device a check runs on, and what only CUDA has.

On the CPU each of these does the same at once, so that the lines around them can be run anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.gpu_check.part import Device, Skipped

_LONG = 50_000_000  # cycles: tens of milliseconds, longer than Python takes for what follows


class Place:
    """A device.

    Args:
        name: Its type.

    Raises:
        Skipped: torch finds no such device.
    """

    def __init__(self, name: Device) -> None:
        if name == "cuda" and not torch.cuda.is_available():
            raise Skipped(f"torch {torch.__version__} finds no CUDA device")
        self.device = torch.device(name)
        self.cuda = name == "cuda"

    def wait(self) -> None:
        """Returns when everything queued is done; an error in it is raised here."""
        if self.cuda:
            torch.cuda.synchronize()

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Another stream than the default one, which is busy for a while."""
        if not self.cuda:
            return contextlib.nullcontext()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)

    def busy(self) -> None:
        """Keeps the current stream busy, so that what does not queue on it is seen to run early."""
        if self.cuda:
            torch.cuda._sleep(_LONG)  # type: ignore[no-untyped-call]

    def recorded(self, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """A call as a CUDA graph: what replays it, and where its result then lies."""
        if not self.cuda:
            out = call()
            return lambda: out.copy_(call()), out
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # compiles, which cannot be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        return graph.replay, out

    def need(self, size: int) -> None:
        """Checks that so many bytes are free.

        Raises:
            Skipped: They are not.
        """
        if self.cuda and (free := torch.cuda.mem_get_info()[0]) < size:
            raise Skipped(
                f"{size / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} free"
            )
