"""Weights of one detector for another: by name, shape, layer map and class names.

Whole units only: half a layer computes nothing that its source ever computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from detr.config import DetectorConfig
from detr.errors import UserError
from detr.models.class_names import listed
from detr.models.detector import Detector
from detr.models.parts import CLASS_HEADS, LABELS, by_part

# What is taken whole or not at all.
_UNIT = re.compile(
    r"((?:encoder|decoder)\.layers|decoder\.(?:class_heads|box_heads|mask_heads|refiner\.qualities)"
    r"|neck\.projections)\.(\d+)\."
)
_PROPOSALS = "source.proposals.class_head."
# Counters of batch norm, which converted weights do not have.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Source:
    """Weights that another detector may take.

    Attributes:
        role: What messages call it: ``teacher`` or ``start``.
        config: The architecture.
        tensors: By name; some may be missing.
    """

    role: str
    config: DetectorConfig
    tensors: Mapping[str, Tensor]


class TransferReport(BaseModel):
    """What a detector took from another.

    Attributes:
        inherited: Its tensor to the source's tensor.
        skipped: Its tensor to the reason it kept its own weights.
        left: The source's tensors that nobody took.
        new_classes: Classes whose rows are its own, by number.
    """

    inherited: dict[str, str]
    skipped: dict[str, str]
    left: list[str]
    new_classes: list[int]

    def text(self, verb: str = "inherited", names: Sequence[str] = ()) -> str:
        """One line for the terminal: parts taken, in part where only some tensors agree, or not.

        Args:
            verb: What happened to the tensors.
            names: Of the classes; without them new ones are not told.
        """
        taken, own = (by_part(tensors) for tensors in (self.inherited, self.skipped))
        total = len(self.inherited) + len(self.skipped)
        told = [
            f"{part} ({count} of {count + own[part]})" if part in own else part
            for part, count in taken.items()
        ]
        line = f"{verb} {len(self.inherited)} of {total} tensors: {', '.join(told)}"
        rest = [part for part in own if part not in taken]
        line = f"{line}; own: {', '.join(rest)}" if rest else line
        if names and self.new_classes:
            line += f"; new classes: {listed([names[i] for i in self.new_classes])}"
        return line

    def details(self, verb: str = "inherited", names: Sequence[str] = ()) -> list[str]:
        """One line for every tensor: where it came from, why it is its own, or that it is left."""
        lines = [
            name if name == source else f"{name} from {source}"
            for name, source in self.inherited.items()
        ]
        fresh = [f"new class {names[i]}: its rows are its own" for i in self.new_classes if names]
        return (
            [f"{verb} {line}" for line in lines]
            + [f"own {name}: {reason}" for name, reason in self.skipped.items()]
            + fresh
            + [f"left {name}" for name in self.left]
        )


def spread_layers(student: int, teacher: int) -> tuple[int, ...]:
    """Teacher layer of each student layer: the first, the last, and evenly between.

    A single student layer takes the teacher's last, whose output the heads were trained on. A
    student deeper than its teacher repeats layers.
    """
    if teacher == 0:
        return ()
    if student == 1:
        return (teacher - 1,)
    return tuple(round(i * (teacher - 1) / (student - 1)) for i in range(student))


def transfer(
    student: Detector,
    source: Source,
    encoder: Sequence[int] | None = None,
    decoder: Sequence[int] | None = None,
    columns: Sequence[int | None] | None = None,
) -> TransferReport:
    """Copies weights into a detector wherever name and shape agree.

    The backbone, layers, heads and input projections are copied whole or not at all. Heads follow
    the decoder map; a shared head or layer follows the last layer. Rows of classes follow the
    classes; those of new ones stay as they were made.

    Args:
        student: Changed in place.
        source: Read only.
        encoder: Source layer (from 0) of each encoder layer; :func:`spread_layers` by default.
        decoder: The same for the decoder.
        columns: The source's class of each class, ``None`` for a new one; by default the same
            where both have as many, and none otherwise.

    Returns:
        What was taken and what was not; nothing may have been.

    Raises:
        UserError: ``inherit-layer-map`` for a map that does not fit the depths.
    """
    ours, theirs = student.config, source.config
    maps = {
        "encoder.layers": _checked(encoder, ours.encoder.layers, theirs.encoder.layers, "encoder"),
        "decoder.layers": _checked(decoder, ours.decoder.layers, theirs.decoder.layers, "decoder"),
    }
    layers = maps["decoder.layers"]
    here, there = ours.decoder, theirs.decoder
    maps["decoder.layers"] = _shared_map(layers, here.own_layers, there.own_layers)
    for heads in ("class_heads", "mask_heads", "refiner.qualities"):
        maps[f"decoder.{heads}"] = _shared_map(layers, here.own_heads, there.own_heads)
    maps["decoder.box_heads"] = _shared_map(layers, here.own_box_heads, there.own_box_heads)
    if columns is None and ours.num_classes == theirs.num_classes:
        columns = range(ours.num_classes)
    columns = [None] * ours.num_classes if columns is None else columns
    own = student.state_dict()
    names = {name: _source_name(name, maps) for name in own}
    same_backbone = _same_backbone(own, ours, source)
    plans: dict[str, list[int | None] | str] = {}
    for name, tensor in own.items():
        if name.startswith("backbone.") and not same_backbone:
            plans[name] = f"the {source.role}'s backbone is another"
        else:
            plans[name] = _plan(name, tensor, names[name], ours, source, columns)
    broken = {
        _unit_of(name)
        for name, plan in plans.items()
        if isinstance(plan, str) and not name.endswith(_COUNTER)
    }
    inherited: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with torch.no_grad():
        for name, tensor in own.items():
            plan, other = plans[name], names[name]
            if isinstance(plan, str):
                skipped[name] = plan
            elif _unit_of(name) in broken or other is None:
                skipped[name] = f"the rest of {_unit_of(name)} does not agree"
            else:
                _copy(tensor, source.tensors[other], plan)
                inherited[name] = other
    taken = set(inherited.values())
    return TransferReport(
        inherited=inherited,
        skipped=skipped,
        left=[name for name in source.tensors if name not in taken],
        new_classes=[i for i, column in enumerate(columns) if column is None],
    )


def _same_backbone(own: Mapping[str, Tensor], ours: DetectorConfig, source: Source) -> bool:
    """Whether both have the same backbone; the source's may go on beyond the last map."""

    def tensors(of: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {
            name: x.shape
            for name, x in of.items()
            if name.startswith("backbone.") and not name.endswith(_COUNTER)
        }

    mine, theirs = tensors(own), tensors(source.tensors)
    a, b = ours.backbone, source.config.backbone
    longer = a.body == b.body and mine.items() <= theirs.items()
    return bool(mine) and (longer or mine == theirs)


def _plan(
    name: str,
    tensor: Tensor,
    other: str | None,
    ours: DetectorConfig,
    source: Source,
    columns: Sequence[int | None],
) -> list[int | None] | str:
    """Which rows of the source a tensor takes, none of them for all, or why it takes none."""
    theirs, role = source.config, source.role
    if other is None or other not in source.tensors:
        return f"the {role} has none"
    found = source.tensors[other]
    by_class = name == LABELS or CLASS_HEADS.match(name) is not None
    if not by_class or tensor.shape[1:] != found.shape[1:]:
        if tensor.shape == found.shape:
            return []
        return f"shape {list(tensor.shape)}, the {role}'s is {list(found.shape)}"
    kinds = ours.heads.classes.kind, theirs.heads.classes.kind
    if name != LABELS and kinds[0] != kinds[1]:
        return f"its scores are {kinds[0]}, the {role}'s {kinds[1]}"
    if name.startswith(_PROPOSALS) and ours.queries.kind != theirs.queries.kind:
        return f"its proposals are {ours.queries.kind}, the {role}'s {theirs.queries.kind}"
    further = tensor.shape[0] - ours.num_classes
    if further != found.shape[0] - theirs.num_classes:
        return f"shape {list(tensor.shape)}, the {role}'s is {list(found.shape)}"
    rows = [*columns, *(theirs.num_classes + i for i in range(further))]
    if name.startswith(_PROPOSALS) and ours.queries.kind == "two_stage":
        rows[0] = 0  # "any object", whatever the classes
    return rows if any(row is not None for row in rows) else "its classes are all new"


def _copy(tensor: Tensor, found: Tensor, rows: Sequence[int | None]) -> None:
    """Copies a tensor, or the rows that are not ``None``."""
    if not rows:
        tensor.copy_(found)
        return
    for i, row in enumerate(rows):
        if row is not None:
            tensor[i].copy_(found[row])


def _source_name(name: str, maps: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a tensor is called in the source; ``None`` where its layer has none there."""
    found = _UNIT.match(name)
    if found is None or found[1] not in maps:
        return name
    layers, index = maps[found[1]], int(found[2])
    if index >= len(layers):
        return None
    return f"{found[1]}.{layers[index]}.{name[found.end() :]}"


def _unit_of(name: str) -> str:
    """The part of a detector a tensor is taken with."""
    if name.startswith("backbone."):
        return "backbone"
    found = _UNIT.match(name)
    return name[: found.end() - 1] if found else name.rpartition(".")[0]


def _checked(layers: Sequence[int] | None, ours: int, theirs: int, part: str) -> tuple[int, ...]:
    """A complete, valid layer map."""
    if layers is None:
        return spread_layers(ours, theirs)
    if len(layers) != ours:
        raise UserError(
            "inherit-layer-map", f"inherit.{part}: {len(layers)} entries for {ours} student layers"
        )
    for i, layer in enumerate(layers):
        if not 0 <= layer < theirs:
            raise UserError(
                "inherit-layer-map",
                f"inherit.{part}[{i}]: the teacher has no layer {layer} (it has {theirs})",
            )
    return tuple(layers)


def _shared_map(layers: tuple[int, ...], ours: int, theirs: int) -> tuple[int, ...]:
    """Teacher part of each student part, either of which may have one for all layers."""
    wanted = layers if ours > 1 else layers[-1:]
    return tuple(min(layer, theirs - 1) for layer in wanted)
