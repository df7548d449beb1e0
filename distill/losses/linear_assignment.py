"""Linear assignment of many problems at once: exact, in threads, with a solver of our own.

``native/assignment.cpp`` solves 900 x 900 about six times as fast as scipy; scipy is what an
installation without a compiler falls back to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.cores import usable_cores
from distill.profiler import timed

_Solver = Callable[[npt.NDArray[np.float32], npt.NDArray[np.int64]], None]
_native: _Solver | None = None
with contextlib.suppress(ImportError):
    _native = import_module("distill.losses._assignment").assign

# Below this much work (about the cube of the smaller side, summed) threads cost more than they win.
_SMALL = 2**20
_NONE = np.empty(0, dtype=np.int64)

_Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@timed("matching")
def assign(
    costs: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Solves many assignment problems.

    Args:
        costs: ``[P, N, M]``, finite; in float32.
        rows: ``[P]`` how many leading rows of each problem count; all by default.
        columns: The same for columns.

    Returns:
        Problem, row and column of every assigned pair, ``[R]`` each on the costs' device, ordered
        by problem and row; a problem has as many pairs as it has rows or columns, the fewer.
    """
    number, height, width = costs.shape
    heights = np.full(number, height) if rows is None else rows.cpu().numpy()
    widths = np.full(number, width) if columns is None else columns.cpu().numpy()
    table = costs.float().cpu().numpy()
    solved: list[_Pairs] = [(_NONE, _NONE)] * number

    def solve(problems: range) -> None:
        for p in problems:
            solved[p] = _solve(table[p, : heights[p], : widths[p]])

    # Threads that share a core push each other's table from its cache.
    workers = min(number, usable_cores())
    work = float((heights * widths * np.minimum(heights, widths)).sum()) if number else 0.0
    if workers > 1 and work > _SMALL:
        # Both solvers let go of Python's lock; every worker takes problems from all over the batch.
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(solve, (range(w, number, workers) for w in range(workers))))
    else:
        solve(range(number))
    problems = np.repeat(np.arange(number), [len(r) for r, _ in solved])
    flat = [np.concatenate([_NONE, *(s[i] for s in solved)]) for i in (0, 1)]
    found = torch.from_numpy(np.stack((problems, *flat)).astype(np.int64))
    found = found.to(costs.device, non_blocking=True)
    return found[0], found[1], found[2]


def _solve(costs: npt.NDArray[np.float32]) -> _Pairs:
    """Row and column of every pair of one problem, ordered by row."""
    if _native is None:
        return _scipy(costs)
    columns = np.empty(len(costs), dtype=np.int64)
    _native(costs, columns)
    rows = np.flatnonzero(columns >= 0)
    return rows, columns[rows]


def _scipy(costs: npt.NDArray[np.float32]) -> _Pairs:
    """The same by scipy, which grows its paths from prices of zero.

    A square problem uses every column, so what a column costs all rows is no choice; without that
    share, columns that are cheap for everybody no longer make the paths long.
    """
    if costs.shape[0] == costs.shape[1]:
        exact = costs.astype(np.float64)
        row, column = linear_sum_assignment(exact - exact.min(0, initial=np.inf))
    else:
        row, column = linear_sum_assignment(costs)
    return row, column
