"""Reading named tensors from files and putting them into modules, by name and never by place."""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.state_dicts import state_dict, unwrapped

# Counters that batch norm keeps for itself; absent from weights that were converted or frozen.
_OPTIONAL = "num_batches_tracked"
# Records that training libraries keep beside the weights, such as mmengine's curves of losses.
_RECORDS = ("numpy.", "mmengine.")


class Checkpoint(NamedTuple):
    """What a file of weights holds.

    Attributes:
        tensors: By name.
        options: The command line of the training that wrote it; empty where it is not told.
        names: Class names by index, where the file tells them (mmdet).
        note: Which of several state dicts the tensors are, in words; empty for the only one.
        left: The key of one that they are not; empty where there is none.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    names: tuple[str, ...] = ()
    note: str = ""
    left: str = ""


class _Record:
    """Stands for a record in a pickle that nobody needs: takes everything, does nothing."""

    def __new__(cls, *values: object, **named: object) -> _Record:
        return object.__new__(cls)

    def __init__(self, *values: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file, without the prefixes of wrappers.

    Raises:
        UserError: ``checkpoint-ema`` for a file of two models, which one must be chosen of, and
            what :func:`read_checkpoint` raises.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.left:
        raise UserError(
            "checkpoint-ema",
            f"{path}: holds averaged weights and others ({checkpoint.left}): keep one "
            "in the file, or choose in `detr weights import`",
        )
    return unwrapped(checkpoint.tensors)


def read_checkpoint(path: Path, averaged: bool | None = None) -> Checkpoint:
    """Tensors and training options of a ``.safetensors`` file or a pickle without code.

    A pickle may be a state dict or have one under ``model`` or ``state_dict``, or a weight average
    under ``ema`` and ``module``, which then counts (RT-DETR); options are a record of plain values
    under ``args``.

    Args:
        path: The file.
        averaged: See :func:`detr.models.state_dicts.state_dict`.

    Raises:
        UserError: ``checkpoint-missing``, ``checkpoint-unreadable``, ``checkpoint-ema``, or
            ``checkpoint-pickle`` for a pickle with code in it, which is never run.
    """
    content = _content(path)
    chosen = state_dict(content, str(path), averaged)
    options = content.get("args")
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return Checkpoint(
        chosen.tensors,
        options if isinstance(options, dict) else {},
        _class_names(content.get("meta")),
        chosen.note,
        chosen.left,
    )


def _content(path: Path) -> dict[str, Any]:
    """What a file holds, nothing of which was run."""
    if not path.is_file():
        raise UserError("checkpoint-missing", f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():  # about pickle protocols: we tell what matters ourselves
            warnings.simplefilter("ignore")
            # Published training states hold their command line, a plain record of values.
            with torch.serialization.safe_globals([argparse.Namespace, *_records(path)]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Zip archives start with PK, bare pickles with their protocol opcode.
        with path.open("rb") as file:
            start = file.read(1)
        if start not in (b"P", b"\x80"):
            raise UserError("checkpoint-unreadable", f"{path}: not a checkpoint") from error
        raise UserError(
            "checkpoint-pickle",
            f"{path}: the pickle holds more than tensors, such as code that would run on loading "
            "it, and was not loaded; save a plain state dict or .safetensors",
        ) from error
    except (EOFError, KeyError, IndexError) as error:  # of a pickle that is none, or cut short
        raise UserError("checkpoint-unreadable", f"{path}: not a checkpoint, or cut off") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError("checkpoint-unreadable", f"{path}: {line}") from error
    if not isinstance(content, dict):
        raise UserError("checkpoint-unreadable", f"{path}: holds no named tensors")
    return content


def _records(path: Path) -> list[tuple[type, str]]:
    """What stands for the records of training libraries in a pickle, none of which is made."""
    if not zipfile.is_zipfile(path):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Record, name) for name in names if name.startswith(_RECORDS)]


def _class_names(meta: Any) -> tuple[str, ...]:
    """Class names of an mmdet checkpoint, whose place and case depend on its version."""
    if not isinstance(meta, dict):
        return ()
    inner = meta.get("dataset_meta")
    table = {str(key).lower(): x for key, x in (inner if isinstance(inner, dict) else meta).items()}
    names = table.get("classes")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def match_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], place: str, surplus_allowed: bool = False
) -> None:
    """Copies tensors into a module; half precision is cast to the module's own type.

    Args:
        module: Filled in place, completely.
        tensors: By name.
        place: Where they come from, for the message.
        surplus_allowed: Ignore names the module does not have.

    Raises:
        UserError: ``checkpoint-mismatch`` naming the tensors that are missing, surplus or of
            another shape, ``checkpoint-nonfinite`` for weights that are NaN or infinite; the
            module is then unchanged.
    """
    own = module.state_dict()
    wanted = {name for name in own if not name.endswith(_OPTIONAL)}
    complaints = {
        "missing": sorted(wanted - tensors.keys()),
        "unexpected": []
        if surplus_allowed
        else sorted(n for n in tensors.keys() - own.keys() if not n.endswith(_OPTIONAL)),
        "other shape": [
            f"{name} is {list(tensors[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if tensors[name].shape != own[name].shape
        ],
    }
    if any(complaints.values()):
        told = []
        for kind, names in complaints.items():
            if names:
                rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
                told.append(f"{kind}: {', '.join(names[:3])}{rest}")
        raise UserError("checkpoint-mismatch", f"{place}: {'; '.join(told)}")
    taken = {name: x for name, x in tensors.items() if name in own}
    refuse_nonfinite(taken, place)
    module.load_state_dict(taken, strict=False)


def refuse_nonfinite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuses weights that a failed training left behind.

    Raises:
        UserError: ``checkpoint-nonfinite`` naming how many tensors have NaN or infinite values.
    """
    broken = sorted(name for name, x in tensors.items() if not bool(x.isfinite().all()))
    if broken:
        rest = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            "checkpoint-nonfinite", f"{place}: NaN or infinite values in {broken[0]}{rest}"
        )
