"""A student starts from its teacher's weights, matched by name and layer map.

D3ETR's "inheriting strategy": encoder and decoder start where the teacher ended, and with them
heads, queries and input projections. Backbones differ and keep their own weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from detr.errors import UserError
from detr.models import Detector

# The parts of a detector, in the order they run, and what modules are called where it differs.
_PARTS = ("backbone", "neck", "encoder", "queries", "decoder", "heads", "denoising")
_NAMES = {"source": "queries", "denoiser": "denoising"}
_HEADS = re.compile(r"decoder\.(?:class|box)_heads\.")
# What is inherited whole or not at all: half a layer computes nothing the teacher ever computed.
_UNIT = re.compile(
    r"((?:encoder|decoder)\.layers|decoder\.(?:class|box)_heads|neck\.projections)\.(\d+)\."
)


class InheritReport(BaseModel):
    """What a student took from its teacher.

    Attributes:
        inherited: Student tensor to teacher tensor.
        skipped: Student tensor to the reason it kept its own weights.
    """

    inherited: dict[str, str]
    skipped: dict[str, str]

    def text(self) -> str:
        """One line for the terminal: parts taken, in part where only some tensors agree, or not."""
        taken, own = (_by_part(names) for names in (self.inherited, self.skipped))
        total = len(self.inherited) + len(self.skipped)
        told = [
            f"{part} ({count} of {count + own[part]})" if part in own else part
            for part, count in taken.items()
        ]
        line = f"inherited {len(self.inherited)} of {total} tensors: {', '.join(told)}"
        rest = [part for part in own if part not in taken]
        return f"{line}; own: {', '.join(rest)}" if rest else line

    def details(self) -> list[str]:
        """One line for every tensor: where it came from, or why it is the student's own."""
        lines = [
            name if name == source else f"{name} from {source}"
            for name, source in self.inherited.items()
        ]
        return [f"inherited {line}" for line in lines] + [
            f"own {name}: {reason}" for name, reason in self.skipped.items()
        ]


def _by_part(names: Iterable[str]) -> dict[str, int]:
    """How many of the tensors are in each part of a detector, in the order of the network."""
    counts = Counter(_part_of(name) for name in names)
    order = [*_PARTS, *sorted(counts.keys() - set(_PARTS))]
    return {part: counts[part] for part in order if counts[part]}


def _part_of(name: str) -> str:
    """The part of a detector a tensor belongs to."""
    if _HEADS.match(name):
        return "heads"
    module = name.partition(".")[0]
    return _NAMES.get(module, module)


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


def inherit(
    student: Detector,
    teacher: Detector,
    encoder: Sequence[int] | None = None,
    decoder: Sequence[int] | None = None,
    backbone: bool = False,
) -> InheritReport:
    """Copies the teacher's weights into the student wherever name and shape agree.

    Layers, heads and input projections are copied whole or not at all. Heads follow the decoder
    map; a shared head or layer follows the last layer.

    Args:
        student: Changed in place.
        teacher: Read only.
        encoder: Teacher layer (from 0) of each student encoder layer;
            :func:`spread_layers` by default.
        decoder: The same for the decoder.
        backbone: Also the backbone.

    Returns:
        What was taken and what was not.

    Raises:
        UserError: ``inherit-layer-map`` for a map that does not fit the depths, ``inherit-nothing``
            where no tensor agrees.
    """
    ours, theirs = student.config, teacher.config
    maps = {
        "encoder.layers": _checked(encoder, ours.encoder.layers, theirs.encoder.layers, "encoder"),
        "decoder.layers": _checked(decoder, ours.decoder.layers, theirs.decoder.layers, "decoder"),
    }
    decoder_map = maps["decoder.layers"]
    for part in ("layers", "class_heads", "box_heads"):
        maps[f"decoder.{part}"] = _shared_map(
            decoder_map, len(getattr(student.decoder, part)), len(getattr(teacher.decoder, part))
        )
    own, source = student.state_dict(), teacher.state_dict()
    names = {name: _teacher_name(name, maps) for name in own}
    reasons = {name: _obstacle(name, own, names[name], source, backbone) for name in own}
    broken = {_unit_of(name) for name, reason in reasons.items() if reason is not None}
    inherited: dict[str, str] = {}
    skipped: dict[str, str] = {}
    with torch.no_grad():
        for name, tensor in own.items():
            theirs_name, reason = names[name], reasons[name]
            if theirs_name is not None and reason is None and _unit_of(name) not in broken:
                tensor.copy_(source[theirs_name])
                inherited[name] = theirs_name
            else:
                skipped[name] = reason or f"the rest of {_unit_of(name)} does not agree"
    if not inherited:
        raise UserError(
            "inherit-nothing",
            "inherit: no tensor of the student has the shape of the teacher's "
            f"(width {ours.width} and {theirs.width}); --set inherit=false",
        )
    return InheritReport(inherited=inherited, skipped=skipped)


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


def _teacher_name(name: str, maps: dict[str, tuple[int, ...]]) -> str | None:
    """What a student tensor is called in the teacher; ``None`` where its layer has no source."""
    found = _UNIT.match(name)
    if found is None or found[1] not in maps:
        return name
    layers, index = maps[found[1]], int(found[2])
    if index >= len(layers):
        return None
    return f"{found[1]}.{layers[index]}.{name[found.end() :]}"


def _obstacle(
    name: str,
    own: dict[str, Tensor],
    theirs: str | None,
    source: dict[str, Tensor],
    backbone: bool,
) -> str | None:
    """Why a tensor is not inherited, or ``None``."""
    if name.startswith("backbone.") and not backbone:
        return "backbones are not inherited"
    if theirs is None or theirs not in source:
        return "the teacher has none"
    if own[name].shape != source[theirs].shape:
        return f"shape {list(own[name].shape)}, the teacher's is {list(source[theirs].shape)}"
    return None


def _unit_of(name: str) -> str:
    """The part of a detector a tensor is inherited with."""
    found = _UNIT.match(name)
    return name[: found.end() - 1] if found else name.rpartition(".")[0]
