"""State-dict adapters as tables: which published tensor becomes which of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detr.errors import UserError
from detr.models.tensors import refuse_nonfinite


@dataclass(frozen=True)
class Rule:
    r"""What happens to the tensors whose whole name a pattern matches.

    Attributes:
        pattern: Regular expression, matched against the whole name.
        target: Our name with ``\1``, ``\2``, ... for the pattern's groups; ``None`` where the
            tensor is not needed. A suffix ``#0``, ``#1``, ... makes the tensor that part of a
            concatenation along its first axis (separate query and key projections become one).
        reason: Why a tensor without a target is not needed.
    """

    pattern: str
    target: str | None
    reason: str = ""


@dataclass
class Renamed:
    """The outcome of a renaming.

    Attributes:
        tensors: Under our names.
        unused: Published tensors that are not needed, with the reason.
    """

    tensors: dict[str, Tensor]
    unused: dict[str, str] = field(default_factory=dict)


def rename(tensors: Mapping[str, Tensor], rules: Sequence[Rule], place: str) -> Renamed:
    """Puts every tensor where the first rule that matches its name says.

    Several tensors may name the same target if they are equal, as published copies of a shared
    head are.

    Args:
        tensors: As published.
        rules: Tried in order.
        place: The source, for messages.

    Raises:
        UserError: ``weights-unknown-tensor`` naming tensors no rule matches,
            ``weights-copies-differ`` where tensors that should be copies of each other are not,
            ``checkpoint-nonfinite`` where one of them is NaN or infinite.
    """
    unknown: list[str] = []
    unused: dict[str, str] = {}
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for name in sorted(tensors):
        found = next(((r, m) for r in rules if (m := re.fullmatch(r.pattern, name))), None)
        if found is None:
            unknown.append(name)
            continue
        rule, match = found
        if rule.target is None:
            unused[name] = rule.reason
            continue
        target, _, part = match.expand(rule.target).partition("#")
        slot = parts.setdefault(target, {})
        number = int(part or 0)
        if number not in slot:
            slot[number] = (name, tensors[name])
        elif torch.equal(slot[number][1], tensors[name]):
            unused[name] = f"a copy of {slot[number][0]}"
        else:
            # A number that is none is no copy of itself.
            refuse_nonfinite({n: tensors[n] for n in (slot[number][0], name)}, place)
            raise UserError(
                "weights-copies-differ",
                f"{place}: {slot[number][0]} and {name} should be copies of each other",
            )
    if unknown:
        rest = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            "weights-unknown-tensor",
            f"{place}: no place for {', '.join(unknown[:3])}{rest} in this architecture",
        )
    joined = {
        target: slot[0][1] if len(slot) == 1 else torch.cat([slot[i][1] for i in sorted(slot)])
        for target, slot in parts.items()
    }
    return Renamed(joined, unused)


def split_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces each ``X.in_proj_{weight,bias}`` by ``X.{q,k,v}_proj.{weight,bias}``.

    ``nn.MultiheadAttention`` stacks its three projections in one tensor.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, found, kind = name.rpartition(".in_proj_")
        if not found:
            result[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            result[f"{owner}.{letter}_proj.{kind}"] = part
    return result
