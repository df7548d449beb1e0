"""Reading named tensors from files and putting them into modules, by name and never by place."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from detr.errors import UserError

# Counters that batch norm keeps for itself; absent from weights that were converted or frozen.
_OPTIONAL = "num_batches_tracked"


class Checkpoint(NamedTuple):
    """What a file of weights holds.

    Attributes:
        tensors: By name.
        options: The command line of the training that wrote it; empty where it is not told.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a pickle that holds nothing but tensors.

    Raises:
        UserError: What :func:`read_checkpoint` raises.
    """
    return read_checkpoint(path).tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """Tensors and training options of a ``.safetensors`` file or a pickle without code.

    A pickle may be a state dict or have one under ``model`` or ``state_dict``, or a weight average
    under ``ema`` and ``module``, which then counts (RT-DETR); options are a record of plain values
    under ``args``.

    Raises:
        UserError: ``checkpoint-missing``, ``checkpoint-unreadable``, or ``checkpoint-pickle`` for a
            pickle with code in it, which is never run.
    """
    if not path.is_file():
        raise UserError("checkpoint-missing", f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return Checkpoint(load_file(path), {})
        with warnings.catch_warnings():  # about pickle protocols: we tell what matters ourselves
            warnings.simplefilter("ignore")
            # Published training states hold their command line, a plain record of values.
            with torch.serialization.safe_globals([argparse.Namespace]):
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
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError("checkpoint-unreadable", f"{path}: {line}") from error
    options = content.get("args") if isinstance(content, dict) else None
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    average = content.get("ema") if isinstance(content, dict) else None
    if isinstance(average, dict) and isinstance(average.get("module"), dict):
        content = average["module"]
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError("checkpoint-unreadable", f"{path}: holds no named tensors")
    tensors = {str(name): x for name, x in content.items() if isinstance(x, Tensor)}
    return Checkpoint(tensors, options if isinstance(options, dict) else {})


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
            another shape; the module is then unchanged.
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
    module.load_state_dict({n: x for n, x in tensors.items() if n in own}, strict=False)
