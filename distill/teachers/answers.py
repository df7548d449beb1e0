"""A teacher's answers on disk: a second student of the same teacher pays no teacher.

Random choices of training follow from (seed, step), so another student under the same seed, data,
augmentation and batch size sees the very same images. An answer lies under the hash of all it
follows from: the teacher's weights, the images themselves and the queries asked. One that does not
fit is therefore never found, and what is found is what the teacher would say, bit for bit.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detr.config import DistributionRefinementConfig
from detr.errors import UserError
from detr.files import output_folder, write_atomic
from detr.models import GroupOutput, Memory, QueryGroup, Teacher, TeacherPart
from detr.models.structures import (
    Denoising,
    DenseAttention,
    FirstBoxes,
    PixelMap,
    Proposals,
    SampledAttention,
)

T = TypeVar("T")

_CLASSES: list[Any] = [
    Memory,
    GroupOutput,
    QueryGroup,
    Proposals,
    Denoising,
    SampledAttention,
    DenseAttention,
    PixelMap,
    FirstBoxes,
]

# Where a memory holds what methods may read.
_PARTS: dict[TeacherPart, tuple[str, ...]] = {
    "memory": ("tokens", "positions"),
    "backbone": ("features",),
    "neck": ("layers",),
    "masks": ("pixels",),
}


class StoredAnswers(nn.Module):
    """A :class:`detr.models.Teacher` that computes what is not on disk, and puts it there.

    Where nothing can be written any more, it says so once and computes on.

    Args:
        teacher: The teacher.
        digest: Of its weights.
        folder: Where answers lie; several teachers and runs, also at once, may share one.
        needs: What the methods read; the rest is not stored.
        say: Takes lines for the log.

    Raises:
        UserError: ``disk-full`` or ``output-unwritable`` where nothing can be written at all.
    """

    def __init__(
        self,
        teacher: Teacher,
        digest: str,
        folder: Path,
        needs: frozenset[TeacherPart],
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        output_folder(folder)
        assert isinstance(teacher, nn.Module)
        self.teacher = teacher
        self.facts = teacher.facts
        self.offers = teacher.offers
        self._digest = digest
        self._folder = folder
        self._needs = needs
        self._say = say
        self._full = False
        self._images: tuple[Tensor, Tensor] | None = None
        self._key = ""
        self._told: Memory | None = None
        self._memory: Memory | None = None

    def encode(self, images: Tensor, valid_sizes: Tensor) -> Memory:
        """See :class:`detr.models.Teacher`; parts that no method reads may be empty."""
        precision = torch.get_autocast_dtype(images.device.type)
        how = f"{torch.__version__} {torch.is_autocast_enabled(images.device.type)} {precision}"
        self._images = (images, valid_sizes)
        self._key = _hash(self._digest, how, images, valid_sizes)
        self._memory = None

        def outline() -> Memory:
            memory = self._see()
            nothing = memory.tokens.new_empty(0)
            empty: dict[str, Any] = {"tokens": nothing, "positions": nothing}
            return replace(memory, **empty, features=[], layers=[], answer=None, pixels=None)

        memory = self._kept(_hash(self._key, "outline"), outline)
        for part, names in _PARTS.items():
            if part in self._needs:
                for name in names:
                    setattr(memory, name, self._part(name))
        self._told = memory
        return memory

    def _part(self, name: str) -> Any:
        return self._kept(_hash(self._key, name), lambda: getattr(self._see(), name))

    def queries(self, memory: Memory) -> list[QueryGroup]:
        """See :class:`detr.models.Teacher`."""
        self._check(memory)
        groups: list[QueryGroup] = self._kept(
            _hash(self._key, "queries"), lambda: self.teacher.queries(self._see())
        )
        return groups

    def decode(
        self,
        memory: Memory,
        groups: list[QueryGroup],
        attention: bool = False,
        self_attention: Collection[str] = (),
    ) -> list[GroupOutput]:
        """See :class:`detr.models.Teacher`."""
        self._check(memory)
        masks = "masks" in self._needs
        key = _hash(self._key, groups, attention, sorted(self_attention), masks)

        def ask() -> list[Any]:
            outputs = self.teacher.decode(self._see(), groups, attention, self_attention)
            return [_bare(output, masks) for output in outputs]

        outputs = self._kept(key, ask)
        return [_whole(x, group, memory) for x, group in zip(outputs, groups, strict=True)]

    def class_contents(self) -> Tensor | None:
        """See :class:`detr.models.Teacher`."""
        return self.teacher.class_contents()

    def forward(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """What the teacher itself finds."""
        return self.teacher(images, valid_sizes, original_sizes)

    def _check(self, memory: Memory) -> None:
        """Whoever shows it a second batch has finished with the first."""
        if memory is not self._told:
            raise ValueError("asked about another batch than the last one it was shown")

    def _see(self) -> Memory:
        """The whole memory, of which only parts are stored."""
        if self._memory is None:
            assert self._images is not None, "asked before it was shown anything"
            self._memory = self.teacher.encode(*self._images)
        return self._memory

    def _kept(self, key: str, compute: Callable[[], T]) -> T:
        path = self._folder / key[:2] / f"{key}.pt"
        assert self._images is not None
        if path.exists():
            try:
                with torch.serialization.safe_globals(_CLASSES):
                    found: T = torch.load(path, self._images[0].device, weights_only=True)
            except Exception:  # cut off or altered: torch's own errors share no base
                pass
            else:
                return found
        value = compute()
        if not self._full:
            file = io.BytesIO()
            torch.save(_dense(value), file)
            try:
                write_atomic(path, file.getvalue())
            except UserError as error:
                self._full = True
                self._say(f"teacher_answers: stored no more: {error.message}")
        return value


def _dense(value: Any) -> Any:
    """The same with every tensor in a storage of its own: a view would bring all it looks into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(_dense(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _dense(getattr(value, f.name)) for f in fields(value)})
    return value


def _bare(output: GroupOutput, masks: bool) -> Any:
    """An answer without what is in the question or the memory, made of tensors and numbers."""
    first: Any = output.first
    if first is not None:
        first = replace(first, refinement=first.refinement.model_dump())
    told = output.masks if masks else []
    bare: dict[str, Any] = {"group": None, "pixels": None, "first": first, "masks": told}
    return replace(output, **bare)


def _whole(bare: Any, group: QueryGroup, memory: Memory) -> GroupOutput:
    """The answer that :func:`_bare` left something out of."""
    first = bare.first
    if first is not None:
        refinement = DistributionRefinementConfig.model_validate(first.refinement)
        first = replace(first, refinement=refinement)
    whole: GroupOutput = replace(bare, group=group, pixels=memory.pixels, first=first)
    return whole


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
        elif isinstance(part, list | tuple):
            digest.update(f"{len(part)} of ".encode())
            for item in part:
                add(item)
        elif is_dataclass(part):
            for one in fields(part):
                digest.update(f"{one.name}=".encode())
                add(getattr(part, one.name))
        else:
            digest.update(f"{part!r};".encode())

    add(parts)
    return digest.hexdigest()
