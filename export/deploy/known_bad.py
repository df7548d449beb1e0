"""Runtime, opset, operator and precision combinations known to build silently and answer wrongly.

The list is data (``known_bad.yaml``) taken from public reports, consulted before an engine is
built so that a known miscompilation is told in a second and not after a build and a comparison.
It is a hint and no proof: the parity gate decides about the engine that was built.

Before a build::

    ops = used_ops(onnx.load(bundle.model))
    for bad in known_bad("tensorrt", "10.14.1.48", bundle.info.opset, ops, "fp32"):
        print(bad.text())
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

import onnx
import yaml

from detr.config import Strict

LIST = Path(__file__).parent / "known_bad.yaml"

_COMPARISONS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


class KnownBad(Strict):
    """One combination.

    Attributes:
        id: Stable name.
        backends: Runtimes, as ``open_engine`` takes them.
        versions: Range of the runtime's versions, comparisons with commas between; empty for all.
        opset: Range of ONNX operator sets, likewise.
        ops: Operators, any of which is affected; those of function bodies count. Empty for all.
        precisions: ``fp32``, ``fp16``, ``int8``; empty for all.
        capabilities: Compute capabilities of the GPUs (87); empty for all.
        what: What goes wrong, one sentence.
        instead: What to do about it.
        links: Public reports.
    """

    id: str
    backends: tuple[str, ...]
    versions: str
    opset: str
    ops: tuple[str, ...]
    precisions: tuple[str, ...]
    capabilities: tuple[int, ...] = ()
    what: str
    instead: str
    links: tuple[str, ...]

    def text(self) -> str:
        """One line for a person."""
        ops = ", ".join(self.ops) or "any operator"
        return f"{ops}: {self.what}; {self.instead} ({', '.join(self.links)})"


def known_bad(
    backend: str,
    version: str,
    opset: int,
    ops: Collection[str],
    precision: str,
    capabilities: Collection[int] = (),
) -> list[KnownBad]:
    """What is known to go wrong with a build.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        version: Version of the runtime, such as ``10.14.1.48``.
        opset: ONNX operator set of the graph.
        ops: Operator types that reach the runtime (:func:`used_ops`); without the body of the
            attention function where a plugin takes its place.
        precision: ``fp32``, ``fp16`` or ``int8``.
        capabilities: Compute capabilities of the GPUs it is for.

    Returns:
        The entries that apply, in the order of the list; usually none.
    """
    return [
        entry
        for entry in known_bad_list()
        if backend in entry.backends
        and in_range(version, entry.versions)
        and in_range(str(opset), entry.opset)
        and (not entry.ops or not set(entry.ops).isdisjoint(ops))
        and (not entry.precisions or precision in entry.precisions)
        and (not entry.capabilities or not set(entry.capabilities).isdisjoint(capabilities))
    ]


def used_ops(model: onnx.ModelProto, bodies: bool = True) -> set[str]:
    """Operator types of a graph and, with ``bodies``, of the functions it calls."""
    nodes = [*model.graph.node]
    if bodies:
        nodes += [node for function in model.functions for node in function.node]
    return {node.op_type for node in nodes}


def in_range(version: str, range_: str) -> bool:
    """Whether a version is in a range such as ``>=10.14,<11``; missing parts count as 0.

    Raises:
        ValueError: A range that is none.
    """
    for condition in filter(None, (part.strip() for part in range_.split(","))):
        found = re.fullmatch(r"(>=|<=|==|>|<)\s*(\d+(?:\.\d+)*)", condition)
        if found is None:
            raise ValueError(f"{range_!r} is no range of versions")
        if not _COMPARISONS[found[1]](*_aligned(version, found[2])):
            return False
    return True


def _aligned(first: str, second: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two versions as numbers of equal length; what follows the digits (``rc1``) is left out."""
    numbers = [[int(n) for n in re.findall(r"\d+", v.split("+")[0])] for v in (first, second)]
    length = max(map(len, numbers))
    a, b = (tuple(n + [0] * (length - len(n))) for n in numbers)
    return a, b


@lru_cache(maxsize=1)
def known_bad_list() -> tuple[KnownBad, ...]:
    """The whole list."""
    entries = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return tuple(KnownBad.model_validate(entry) for entry in entries)
