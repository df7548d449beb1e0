"""Times what a GPU does and nothing else: recorded once, replayed from a CUDA graph.

Started from Python, a kernel of ten microseconds takes as long as Python takes to start it. And
called again on the same arrays, it finds them in the second cache, where a network's layers would
have put something else meanwhile. So several copies of the inputs are recorded one after the other,
together larger than that cache, and the graph is replayed between two events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Times the second cache that the copies fill.
_CACHES = 2
_MOST_COPIES = 64


def copies_needed(bytes_each: int, cache_bytes: int) -> int:
    """How many copies of the inputs leave nothing of the first in the cache when it comes again."""
    return max(2, min(_MOST_COPIES, -(-_CACHES * cache_bytes // max(1, bytes_each)) + 1))


class Replay:
    """One call after the other on copies of its inputs, as one CUDA graph.

    Args:
        call: Runs on one copy of the inputs; it must not wait for the device.
        copies: The inputs, once for each call in the graph.

    Attributes:
        calls: Calls in the graph.
    """

    def __init__(self, call: Callable[[Any], object], copies: list[Any]) -> None:
        import torch

        self.calls = len(copies)
        # What is compiled and allocated once must not be recorded, so it happens before, on a
        # stream that is not the default one.
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(copies[0])
        torch.cuda.current_stream().wait_stream(side)
        self._graph: Any = torch.cuda.CUDAGraph()
        self._kept: list[object] = []
        with torch.cuda.graph(self._graph):
            for inputs in copies:
                self._kept.append(call(inputs))
        self._events: list[Any] = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]
        self.milliseconds()  # the first replay uploads the graph

    def milliseconds(self) -> float:
        """Device time of one call, over one replay."""
        begin, end = self._events
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / self.calls
