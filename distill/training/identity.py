"""Which keys bind a run that goes on, and why.

The weights of a run follow from its recipe and what lies at the recipe's paths, step by step. A run
that goes on promises the weights of one that was never stopped, so every key binds, but for three
kinds:

* :data:`FREE`: no weight depends on them.
* :data:`AHEAD`: they change the steps to come and none that is done. A longer run and a lower rate
  are what a person wants of a run that is short or diverges; from there on the run is another one,
  which ``changes.jsonl`` and the model's provenance say.
* :data:`PLACES`: where something lies. What lies there binds (:class:`Sources`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from detr.errors import UserError
from distill.recipe import Recipe

FREE = (
    "name",
    "data.val",
    "data.max_unreadable",
    "validation",
    "teacher_answers",  # the same answers, read or computed
    "min_teacher_ap",  # said before the first step; a run that goes on has passed it
    "checkpoint_every",
    "tensorboard",
    "wandb",
    "mlflow",
    "workers",  # a batch follows from seed and step, whoever makes it
)
AHEAD = ("steps", "optimizer.lr", "optimizer.backbone_lr")
PLACES = ("data.train", "teacher")


class Change(BaseModel):
    """A key of :data:`AHEAD`, or data that were mended, when a run went on.

    Attributes:
        step: Steps done before.
        key: Of the recipe.
        before, now: Its values; of data, their fingerprints.
    """

    step: int
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"from step {self.step} on: {self.key} {self.before} -> {self.now}"


class Sources(BaseModel):
    """What lies at the recipe's paths.

    Attributes:
        data: Fingerprint of the training data.
        teacher: Digest of the teacher's weights.
    """

    data: str
    teacher: str | None = None


def changes(path: Path, before: Recipe, now: Recipe) -> list[Change]:
    """What a run that goes on does otherwise from here on.

    Args:
        path: The run directory, for the message.
        before: What the run was made with.
        now: What is asked for.

    Raises:
        UserError: ``run-differs`` naming the first key that binds and differs.
    """
    found = []
    for key, old, new in _differences(before, now):
        if _under(key, FREE) or _under(key, PLACES):
            continue
        if _under(key, ("methods",)) and _names(before) != _names(now):
            raise _differs(path, "methods", _names(before), _names(now))
        if not _under(key, AHEAD):
            raise _differs(path, key, old, new)
        if key != "steps" and new > old:
            raise UserError(
                "run-differs",
                f"{path}: {key} was {old}, and a run that goes on can only lower it ({new} was "
                "asked for); choose another --out or a lower rate",
            )
        found.append(Change(step=0, key=key, before=old, now=new))
    return found


def moved(before: Recipe, now: Recipe) -> bool:
    """Whether something is said to lie elsewhere, so that what lies there must be looked at."""
    return any(_under(key, PLACES) for key, _, _ in _differences(before, now))


def source_changes(
    path: Path, before: tuple[Recipe, Sources | None], now: tuple[Recipe, Sources]
) -> list[Change]:
    """What lies at the recipe's paths and is not what the run began with.

    Data in their old place may have been mended, as the message of a loss that is not finite
    advises; data elsewhere and a teacher must be the same.

    Raises:
        UserError: ``run-differs``.
    """
    (old, was), (new, found) = before, now
    if old.teacher != new.teacher or (was is not None and was.teacher != found.teacher):
        if None in (old.teacher, new.teacher) or was is None:
            raise _differs(path, "teacher", old.teacher, new.teacher)
        if was.teacher != found.teacher:
            raise UserError(
                "run-differs",
                f"{path}: teacher: {new.teacher} has other weights than the teacher this run began "
                "with; choose another --out or the same teacher",
            )
    elsewhere = old.data.train != new.data.train
    if was is None:
        if elsewhere:
            raise _differs(path, "data.train", old.data.train, new.data.train)
        return []
    if was.data == found.data:
        return []
    if elsewhere:
        raise UserError(
            "run-differs",
            f"{path}: data.train: {new.data.train} is not what {old.data.train} was when the run "
            "began (images, sizes, labels); choose another --out or the same data",
        )
    return [Change(step=0, key=f"content of {new.data.train}", before=was.data, now=found.data)]


def weights_digest(module: nn.Module) -> str:
    """A hash of all tensors of a network, wherever its file lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _differs(path: Path, key: str, old: object, new: object) -> UserError:
    return UserError(
        "run-differs",
        f"{path}: was made with {key}={old}, now asked for {new}; choose another --out or the "
        "same recipe",
    )


def _names(recipe: Recipe) -> str:
    """Of its methods."""
    return "+".join(name for entry in recipe.methods for name in entry) or "none"


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    old, new = (_flatten(recipe.model_dump(mode="json")) for recipe in (before, now))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    items: list[tuple[str, Any]]
    if isinstance(value, dict):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {key: value}
    if not items:  # such as a method's options
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in items:
        flat.update(_flatten(inner, f"{key}.{name}" if key else name))
    return flat
