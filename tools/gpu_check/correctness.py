"""The torch operator against float64: types, head widths, memory layouts, streams, threads, sizes.

Figures of a case are errors as shares of what is allowed, so that 1 is the most everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from detr.models.attention.ms_deform_attn import ms_deform_attn
from tools.gpu_check.part import Cases, Device, Parts, Setting
from tools.gpu_check.place import Place
from tools.gpu_check.problems import DTYPES, Problem, problem

# Odd, narrower and wider than a load, as wide as a warp reads at once; 37 is left to grid_sample.
WIDTHS = (7, 8, 12, 16, 32, 36, 37, 64, 96, 128, 256)
_BEYOND = 2**31 + 2**20  # elements: more than 32 bits count
_WITHOUT_KERNEL = (37,)


def correctness(setting: Setting) -> Parts:
    """Every type and head width, then what can be odd about a call, then arrays past 2^31."""
    device = setting.device
    elements = _BEYOND if device == "cuda" else 2**18
    return {
        **{f"widths {dtype}": partial(widths, device, dtype) for dtype in DTYPES},
        **{f"calls {dtype}": partial(calls, device, dtype) for dtype in ("float32", "float16")},
        "gradcheck": partial(gradcheck, device),
        "large": partial(large, device, elements),
    }


def widths(device: Device, dtype: str) -> str:
    """Every head width of one type; samples that are no numbers where a kernel of ours runs."""
    place, cases = Place(device), Cases()
    for channels in WIDTHS:
        wanted = device == "cpu" or channels not in _WITHOUT_KERNEL
        cases.run(f"{channels} channels", partial(_width, place, dtype, channels, wanted), 1)
    return cases.finish()


def _width(place: Place, dtype: str, channels: int, wanted: bool) -> dict[str, float]:
    asked = problem(dtype, place.device, channels)
    if place.cuda and asked.has_kernel != wanted:
        raise RuntimeError(f"kernel: {asked.has_kernel}, wanted: {wanted}")
    asked = problem(dtype, place.device, channels, wild=asked.has_kernel)
    return asked.shares(asked.run())


def calls(device: Device, dtype: str) -> str:
    """One problem, called in every way it may come."""
    place, cases = Place(device), Cases()
    for case in (unaligned, strided, empty, side_stream, fresh_thread, recorded, autocast):
        cases.run(case.__name__, partial(case, place, problem(dtype, place.device)), 1)
    return cases.finish()


def unaligned(place: Place, asked: Problem) -> Mapping[str, float]:
    """Arrays that start one element behind a good address."""

    def moved(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(tensor.numel() + 1)
        return room[1:].view(tensor.shape).copy_(tensor)

    return _with(asked, moved)


def strided(place: Place, asked: Problem) -> Mapping[str, float]:
    """Arrays whose dimensions lie in another order."""

    def turned(tensor: Tensor) -> Tensor:
        dims = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(dims).contiguous().permute(dims)

    return _with(asked, turned)


def _with(asked: Problem, change: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
    changed = replace(_grown(asked, change), value=change(asked.value))
    return changed.shares(changed.run())


def empty(place: Place, asked: Problem) -> Mapping[str, float]:
    """No query, and no image."""
    figures: dict[str, float] = {}
    for name, batch, queries in (("queries", 2, 0), ("images", 0, 11)):
        none = problem(asked.dtype, place.device, batch=batch, queries=queries)
        found = none.run()
        place.wait()
        figures |= {f"{name} {key}": share for key, share in none.shares(found).items()}
    return figures


def side_stream(place: Place, asked: Problem) -> Mapping[str, float]:
    """Inputs that are ready late, on a stream that is not the default one."""
    wanted = [tensor.clone() for tensor in (asked.value, asked.grad_out)]
    asked.value.zero_()
    asked.grad_out.zero_()
    place.wait()
    with place.side_stream():
        place.busy()
        asked.value.copy_(wanted[0])
        asked.grad_out.copy_(wanted[1])
        found = asked.run()
    place.wait()
    return asked.shares(found)


def fresh_thread(place: Place, asked: Problem) -> Mapping[str, float]:
    """A thread that has called nothing of CUDA yet."""
    found: list[Tensor] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.extend(asked.run())
        except BaseException as error:  # told by the thread that waits
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    place.wait()
    return asked.shares(found)


def recorded(place: Place, asked: Problem) -> Mapping[str, float]:
    """Forward in a CUDA graph, replayed on other inputs than it was recorded with."""
    wanted = asked.value.clone()
    asked.value.zero_()
    replay, out = place.recorded(
        lambda: ms_deform_attn(asked.value, asked.shapes, asked.locations, asked.weights)
    )
    asked.value.copy_(wanted)
    replay()
    place.wait()
    return asked.shares([out, *asked.run()[1:]])


def autocast(place: Place, asked: Problem) -> Mapping[str, float]:
    """Under autocast the value keeps its type and coordinates are float32, whatever they were."""
    with torch.autocast(place.device.type, torch.bfloat16):
        half = asked.locations.to(torch.bfloat16)
        out = ms_deform_attn(asked.value, asked.shapes, half, asked.weights)
    if out.dtype != asked.value.dtype:
        raise TypeError(f"the output is {out.dtype}")
    same = Problem(asked.value, half.float(), asked.weights, asked.grad_out, asked.shapes)
    return same.shares([out, *same.run()[1:]])


def gradcheck(device: Device) -> dict[str, float]:
    """Gradients in float64 against differences; samples keep away from the cells' edges."""
    place = Place(device)
    shapes = ((3, 4), (2, 2))
    asked = problem("float64", place.device, 2, 1, 2, 2, 2, shapes)
    generator = torch.Generator().manual_seed(0)
    cells = torch.tensor([[width, height] for height, width in shapes], dtype=torch.float64)
    cells = cells.view(1, 1, 1, len(shapes), 1, 2)
    inside = torch.rand(asked.locations.shape, generator=generator, dtype=torch.float64)
    corner = (inside * cells).floor().clamp(max=cells - 1)
    apart = 0.2 + 0.6 * torch.rand(inside.shape, generator=generator, dtype=torch.float64)
    locations = ((corner + apart - 0.5 + 1) / (cells + 1)).to(place.device)
    inputs = (asked.value, locations, asked.weights)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    try:
        torch.autograd.gradcheck(
            lambda value, at, weights: ms_deform_attn(value, shapes, at, weights),
            leaves,
            nondet_tol=1e-10,  # sums of atomic additions have no order
        )
    except GradcheckError as error:
        raise RuntimeError(str(error).splitlines()[0]) from error  # matrices follow
    return {"elements": sum(leaf.numel() for leaf in leaves)}


def large(device: Device, elements: int) -> str:
    """Values, outputs and samples of more elements than 32 bits count, in half precision."""
    place, cases = Place(device), Cases()
    for case in (large_values, large_outputs, large_samples):
        cases.run(case.__name__, partial(case, place, elements), 1)
        if place.cuda:
            torch.cuda.empty_cache()
    return cases.finish()


def large_values(place: Place, elements: int) -> Mapping[str, float]:
    """Many images: the last one's answer is that of the image alone."""
    side = 256 if place.cuda else 16
    shapes, heads, channels = ((side, side),), 8, 32
    batch = -(-elements // (side * side * heads * channels))
    place.need(elements * 14)
    alone = problem("float16", place.device, channels, 1, 50, heads, shapes=shapes)
    value = torch.zeros(batch, *alone.value.shape[1:], dtype=torch.float16, device=place.device)
    value[-1] = alone.value[0]
    many = _grown(alone, partial(_last_of, batch))
    return _as_alone(replace(many, value=value), alone, -1)


def large_outputs(place: Place, elements: int) -> Mapping[str, float]:
    """Many queries: the last ones' answers are those of the queries alone."""
    heads, channels, few = 8, 256, 50
    queries = -(-elements // (heads * channels))
    place.need(elements * 10)
    alone = problem("float16", place.device, channels, 1, few, heads, 1, ((9, 7),))
    return _as_alone(_grown(alone, partial(_last_queries, queries)), alone, few)


def large_samples(place: Place, elements: int) -> Mapping[str, float]:
    """Many samples of each query."""
    heads, points, few = 8, 16, 50
    queries = -(-elements // (heads * 4 * points * 2))
    place.need(elements * 26)
    alone = problem("float16", place.device, 8, batch=1, queries=few, heads=heads, points=points)
    return _as_alone(_grown(alone, partial(_last_queries, queries)), alone, few)


def _grown(alone: Problem, grow: Callable[[Tensor], Tensor]) -> Problem:
    """A problem with more of what queries have."""
    return replace(
        alone,
        locations=grow(alone.locations),
        weights=grow(alone.weights),
        grad_out=grow(alone.grad_out),
    )


def _last_of(batch: int, tensor: Tensor) -> Tensor:
    """The one image's tensor as the last of many; the others' are zeros."""
    many = torch.zeros(batch, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    many[-1] = tensor[0]
    return many


def _last_queries(queries: int, tensor: Tensor) -> Tensor:
    """The queries' tensor at the end of a longer one."""
    many = torch.zeros(1, queries, *tensor.shape[2:], dtype=tensor.dtype, device=tensor.device)
    many[:, -tensor.shape[1] :] = tensor
    return many


def _as_alone(many: Problem, alone: Problem, part: int) -> Mapping[str, float]:
    """Compares the last image (``part`` -1) or the last queries with a problem of their own."""
    found = many.run()
    return alone.shares([x[-1:] if part < 0 else _tail(i, x, part) for i, x in enumerate(found)])


def _tail(index: int, tensor: Tensor, queries: int) -> Tensor:
    """The last queries' part; the gradient of the value belongs to all queries."""
    return tensor if index == 1 else tensor[:, -queries:]
