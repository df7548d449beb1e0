"""The smallest single-precision island that holds the parity budget.

Parts are taken out of the island in groups, largest first: a whole kind, then what it has in one
stage of the network, then part by part. What can go stays out; a single part that cannot go is
needed. That is greedy: the island found is minimal in that none of its parts can be taken out
alone, given the others; another one may be as small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from detr.cli_support import progress
from detr.errors import UserError
from engines.parity import Budget, Outcome
from engines.precision_report import IslandSearch, IslandTrial
from export.precision.half import DEFAULT_ISLAND, in_island

# From the outputs backwards: what is near them needs precision first.
_STAGES = ("decoder", "source", "encoder", "neck", "backbone")
# How far a graph with an island is from the float32 torch model.
Comparator = Callable[[Collection[str]], Outcome]


@dataclass(frozen=True)
class _Group:
    name: str
    parts: frozenset[str]


class _Search:
    def __init__(self, comparator: Comparator, budget: Budget, most: int) -> None:
        self._comparator, self.budget, self._most = comparator, budget, most
        self.trials: list[IslandTrial] = []
        self._bar = progress(range(most), "searching the island", most)

    @property
    def spent(self) -> bool:
        return len(self.trials) >= self._most

    def holds(self, change: str, island: Collection[str]) -> bool:
        outcome = self._comparator(island)
        holds = not outcome.violations(self.budget)
        trial = IslandTrial(change=change, parts=len(island), outcome=outcome, holds=holds)
        self.trials.append(trial)
        self._bar.set_postfix_str(change)
        self._bar.update()
        return holds


def search_islands(
    parts: Collection[str], comparator: Comparator, budget: Budget, most: int = 40
) -> IslandSearch:
    """Finds an island none of whose parts can go.

    Args:
        parts: Every part of the network, as :func:`node_kinds.part_names` names them.
        comparator: Compares a graph with the given island with the reference.
        budget: What the difference may be.
        most: Trials at most; what was not tried then stays in the island.

    Raises:
        UserError: ``island-budget`` where float32 everywhere is over the budget too.
    """
    search = _Search(comparator, budget, most)
    if search.holds("no island", frozenset()):
        return IslandSearch(island=(), trials=tuple(search.trials), complete=True)
    island = _grown(search, parts)
    queue = _kinds(island)
    while queue and not search.spent:
        group = queue.pop(0)
        if search.holds(f"without {group.name}", island - group.parts):
            island -= group.parts
        elif len(group.parts) > 1:
            queue = [*_children(group), *queue]
    return IslandSearch(
        island=tuple(sorted(island)), trials=tuple(search.trials), complete=not queue
    )


def _grown(search: _Search, parts: Collection[str]) -> frozenset[str]:
    """The default island, or the first larger one that holds the budget."""
    island = frozenset(part for part in parts if in_island(part, DEFAULT_ISLAND))
    if search.holds("default island", island):
        return island
    rest = [part for part in parts if part not in island]
    for stage in _STAGES:
        more = frozenset(part for part in rest if _scope(part)[:1] == [stage])
        if more <= island:
            continue
        island |= more
        if search.holds(f"with module:{stage}", island):
            return island
    raise UserError(
        "island-budget",
        "float32 throughout is over the budget too: "
        f"{', '.join(search.trials[-1].outcome.violations(search.budget))}; no island can help",
    )


def _kinds(island: Collection[str]) -> list[_Group]:
    kinds: dict[str, set[str]] = {}
    for part in sorted(island):
        kinds.setdefault(part.split(":")[0], set()).add(part)
    return [_group(kind, parts) for kind, parts in kinds.items()]


def _group(name: str, parts: set[str]) -> _Group:
    """Parts under a common name; a single one under its own."""
    return _Group(next(iter(parts)) if len(parts) == 1 else name, frozenset(parts))


def _children(group: _Group) -> Sequence[_Group]:
    """A kind by stages of the network, a stage by its parts."""
    if ":" in group.name:
        return _single(group)
    stages: dict[str, set[str]] = {}
    for part in sorted(group.parts):
        stages.setdefault(f"{group.name}:{'.'.join(_scope(part)[:1])}", set()).add(part)
    if len(stages) == 1:
        return _single(group)
    return [_group(name, parts) for name, parts in stages.items()]


def _single(group: _Group) -> list[_Group]:
    return [_Group(part, frozenset({part})) for part in sorted(group.parts)]


def _scope(part: str) -> list[str]:
    """The path of a part's module."""
    return part.partition(":")[2].split(".")
