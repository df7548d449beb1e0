"""The CUDA source of one kind of attention, for NVRTC, nvcc and the TensorRT plugin alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from detr.points import Points, level_points

FOLDER = Path(__file__).resolve().parent
HEADER = FOLDER / "include" / "msda.hpp"
KERNELS = FOLDER / "cuda" / "msda.cu"

FORWARD = "msda_forward"
BACKWARD = "msda_backward"
_WARP = 32
_THREADS = (128, 64, 32)  # of a block, best first
_SHARED_BYTES = 48 * 1024  # of a block, on every GPU
_LOAD_BYTES = 16  # the widest load of a thread
_TYPES = {
    "float16": ("Half", 2),
    "bfloat16": ("BFloat16", 2),
    "float32": ("float", 4),
    "float64": ("double", 8),
}


@cache
def header_text() -> str:
    return HEADER.read_text()


@cache
def _kernel_text() -> str:
    return KERNELS.read_text()


@dataclass(frozen=True)
class Attention:
    """What the kernels are compiled for; batch and number of queries are arguments at run time.

    Attributes:
        dtype: Type of the values: float16, bfloat16, float32 or float64.
        heads: M.
        channels: D, of one head.
        levels: V.
        points: P, of one head and level, or of each level.
        shapes: (height, width) of each level where they never change, which saves the kernel some
            arithmetic; ``None`` where each call gives them (training on several image sizes).
        forward_only: Leave the backward kernel out, which a runtime would compile for nothing.
    """

    dtype: str
    heads: int
    channels: int
    levels: int
    points: Points
    shapes: tuple[tuple[int, int], ...] | None = None
    forward_only: bool = False

    @cached_property
    def lane_channels(self) -> int:
        """Channels one thread reads at once, at most 16 bytes unless the head is very wide."""
        size = _TYPES[self.dtype][1]
        lane = _LOAD_BYTES // size
        while self.channels % lane:
            lane //= 2
        while self.channels > lane * _WARP and self.channels % (2 * lane) == 0:
            lane *= 2
        return lane

    @cached_property
    def lanes(self) -> int:
        """Threads of one head: a power of two."""
        needed = max(1, self.channels // self.lane_channels)
        return 1 << (needed - 1).bit_length()

    @cached_property
    def threads(self) -> int:
        """Threads of a block: as many as its samples' shared memory allows."""
        fitting = [n for n in _THREADS if n // self.lanes * self._group_bytes <= _SHARED_BYTES]
        return fitting[0] if fitting else _THREADS[-1]

    @property
    def _group_bytes(self) -> int:
        """Shared memory for the samples of one (image, query, head), in the backward kernel."""
        coordinate = 8 if self.dtype == "float64" else 4
        return (self.samples | 1) * (7 * coordinate + 8)

    @cached_property
    def samples(self) -> int:
        """Of a query in one head."""
        return sum(level_points(self.points, self.levels))

    @cached_property
    def supported(self) -> bool:
        """Whether there is something to do, a head fits a warp, and its samples shared memory."""
        points = level_points(self.points, self.levels)
        if min(self.heads, self.channels, self.levels, *points) < 1:
            return False
        return self.lanes <= _WARP and self.groups_per_block * self._group_bytes <= _SHARED_BYTES

    @cached_property
    def groups_per_block(self) -> int:
        """(image, query, head) triples one block computes."""
        return self.threads // self.lanes

    def blocks(self, groups: int) -> int:
        """Blocks needed for so many triples."""
        return -(-groups // self.groups_per_block)

    @property
    def source(self) -> str:
        """The complete text to compile; it includes ``msda.hpp``."""
        macros: dict[str, object] = {
            "MSDA_VALUE": _TYPES[self.dtype][0],
            "MSDA_HEADS": self.heads,
            "MSDA_CHANNELS": self.channels,
            "MSDA_LEVELS": self.levels,
            "MSDA_SAMPLES": self.samples,
            "MSDA_LANE_CHANNELS": self.lane_channels,
            "MSDA_LANES": self.lanes,
            "MSDA_THREADS": self.threads,
        }
        if isinstance(self.points, int):
            macros["MSDA_POINTS"] = self.points
        else:
            macros["MSDA_LEVEL_POINTS"] = ", ".join(map(str, self.points))
        if self.shapes is not None:
            sizes = (f"{{{height}, {width}}}" for height, width in self.shapes)
            macros["MSDA_SIZES"] = ", ".join(sizes)
        if self.forward_only:
            macros["MSDA_FORWARD_ONLY"] = 1
        lines = [f"#define {name} {value}" for name, value in macros.items()]
        return "\n".join([*lines, _kernel_text()])
