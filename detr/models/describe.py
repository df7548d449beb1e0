"""What a detector weighs and costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from detr.config import DetectorConfig
from detr.models.detector import Detector, build_detector
from detr.models.structures import Memory

PARTS = ("backbone", "neck", "encoder", "source", "decoder")


@register_flop_formula(torch.ops.detr.ms_deform_attn)
def _deformable_flops(
    value: Sequence[int],
    spatial_shapes: Sequence[int],
    locations: Sequence[int],
    weights: Sequence[int],
    points: Sequence[int] | None = None,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """Four neighbors blended, then weighted, per sample and channel: 5 multiply-adds."""
    return 2 * 5 * math.prod(weights) * value[3]


def parameters(detector: Detector) -> dict[str, int]:
    """Number of parameters (trained or frozen) of each part, and their ``total``."""
    parts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in detector.named_children()
    }
    return {**parts, "total": sum(parts.values())}


class Part(BaseModel):
    """One part of a detector.

    Attributes:
        parameters: Their number.
        gflops: Multiply-adds of one image, in units of 1e9; what the field's tables call GFLOPs.
        milliseconds: Time on this machine, or ``None`` where it was not measured.
    """

    parameters: int
    gflops: float
    milliseconds: float | None = None


class Description(BaseModel):
    """What a detector weighs and costs at one image size.

    Attributes:
        name: What was described.
        size: (height, width) of the canvas.
        tokens: Number of encoder tokens per level.
        parts: By name, in the order they run.
        parameters, gflops: Totals.
    """

    name: str
    size: tuple[int, int]
    tokens: list[int]
    parts: dict[str, Part]
    parameters: int
    gflops: float

    def text(self) -> str:
        """A table for the terminal."""
        total = sum(p.milliseconds or 0 for p in self.parts.values())
        lines = [
            f"{self.name} at {self.size[0]}x{self.size[1]}",
            f"tokens {sum(self.tokens)} ({' + '.join(map(str, self.tokens))})",
            f"{'part':<10}{'params M':>10}{'GFLOPs':>10}{'time':>8}",
        ]
        for name, part in self.parts.items():
            share = f"{(part.milliseconds or 0) / total:.0%}" if total else "-"
            count = part.parameters / 1e6
            lines.append(f"{name:<10}{count:>10.2f}{part.gflops:>10.2f}{share:>8}")
        whole = f"{total:.0f} ms" if total else "-"
        lines.append(f"{'total':<10}{self.parameters / 1e6:>10.2f}{self.gflops:>10.2f}{whole:>8}")
        return "\n".join(lines)


def describe(
    config: DetectorConfig, name: str, size: tuple[int, int], timed: bool = False
) -> Description:
    """Parameters, multiply-adds and, if asked for, time of each part for one whole image.

    Args:
        config: The detector.
        name: To show.
        size: (height, width) of the canvas, filled by the image.
        timed: Also run it, with random weights, on the CPU.
    """
    with torch.device("meta"):
        # Without gradients: the counter follows those of whatever passes from part to part.
        detector = build_detector(config, pretrained=False).eval().requires_grad_(False)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            memory = _run(detector, size)
    weights = parameters(detector)
    flops = counter.get_flop_counts()
    times = _times(config, size) if timed else {}
    parts = {
        part: Part(
            parameters=weights[part],
            gflops=sum(flops.get(type(getattr(detector, part)).__name__, {}).values()) / 2e9,
            milliseconds=times.get(part),
        )
        for part in PARTS
    }
    if "denoiser" in weights:
        parts["denoiser"] = Part(parameters=weights["denoiser"], gflops=0.0)
    return Description(
        name=name,
        size=size,
        tokens=[height * width for height, width in memory.shapes],
        parts=parts,
        parameters=weights["total"],
        gflops=sum(part.gflops for part in parts.values()),
    )


def _run(detector: Detector, size: tuple[int, int]) -> Memory:
    """One pass over an empty image, as in inference; the memory, for its shapes."""
    valid = torch.tensor([[float(size[0]), float(size[1])]])
    memory = detector.encode(torch.zeros(1, 3, *size), valid)
    detector.decoder(memory, detector.queries(memory), detector.source, final_only=True)
    return memory


def _times(config: DetectorConfig, size: tuple[int, int]) -> dict[str, float]:
    """Milliseconds of each part, the faster of two runs."""
    detector = build_detector(config, pretrained=False).eval()
    best: dict[str, float] = {}
    for _ in range(2):
        spent = dict.fromkeys(PARTS, 0.0)
        handles = []
        for part in PARTS:
            before, after = _stopwatch(spent, part)
            module = getattr(detector, part)
            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]
        with torch.no_grad():
            _run(detector, size)
        for handle in handles:
            handle.remove()
        best = {part: min(ms, best.get(part, ms)) for part, ms in spent.items()}
    return best


def _stopwatch(
    spent: dict[str, float], part: str
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that add a module's time to ``spent[part]``, milliseconds."""
    started = [0.0]

    def before(*_: Any) -> None:
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[part] += (time.perf_counter() - started[0]) * 1e3

    return before, after
